"""Settings: one frozen, typed class a process, read from flags and `THUMBWHEEL_*` variables, validated at the start.

Every process has a subclass of `Settings` in its own `config.py`; a field is documented beneath it, and that text is
what `--help` shows. A value that follows from others is a property, not a field.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, Self
from urllib.parse import urlsplit

from platformdirs import user_data_path
from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from thumbwheel.tls import ClientTls


def split_address(address: str) -> tuple[str, int]:
    """Splits "host:port". Raises ValueError where it is not of that form."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port, such as 127.0.0.1:50051")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True where `host` can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _checked_addresses(value: str) -> str:
    for address in value.split(","):
        split_address(address)
    return value


Address = Annotated[str, AfterValidator(_checked_addresses)]
"""An address as "host:port"."""


def _checked_endpoint(value: str) -> str:
    if value and urlsplit(value).scheme not in ("http", "https"):
        raise ValueError(f"{value!r} is no URL, such as http://127.0.0.1:4317")
    return value


TraceEndpoint = Annotated[str, AfterValidator(_checked_endpoint)]
"""A URL, or nothing; https encrypts."""


class CommandSettings(BaseSettings):
    """Settings of a command that ends by itself."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="THUMBWHEEL_",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        validate_default=True,
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to log."""

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None, *, prog: str, description: str = "") -> Self:
        """Reads flags, then variables, then defaults. Ends the process with a clear message where a value is wrong."""
        source = type(cls.__name__, (cls,), {"__doc__": description or cls.__doc__, "__module__": cls.__module__})
        try:
            settings: Self = source(_cli_parse_args=list(sys.argv[1:] if argv is None else argv), _cli_prog_name=prog)
            return settings
        except ValidationError as error:
            _explain(error, prog)


class Settings(CommandSettings):
    """What every process needs to know."""

    home: Path = Field(default_factory=lambda: user_data_path("thumbwheel"))
    """Folder with all state of this deployment: keys, versions, database, training checkpoints, logs."""

    listen: Address = "127.0.0.1:50050"
    """Address of the gRPC server; port 0 takes any free one."""

    metrics_port: int = Field(default=9100, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""

    bootstrap_servers: Address = "127.0.0.1:9092"
    """Kafka brokers, separated by commas."""

    kafka_ca: Path | None = None
    """PEM file of the authorities whose certificates the brokers must have. Given, connections to them are
    encrypted."""

    kafka_certificate: Path | None = None
    """PEM file of the certificate that this process shows the brokers (mutual TLS); given with `kafka_key`."""

    kafka_key: Path | None = None
    """PEM file of that certificate's private key."""

    topic_partitions: int = Field(default=1, ge=1)
    """Partitions of a topic that is created because it is missing."""

    topic_replication: int = Field(default=1, ge=1)
    """Replicas of a topic that is created because it is missing."""

    trace_endpoint: TraceEndpoint = ""
    """URL of the OpenTelemetry collector that spans are sent to by OTLP over gRPC, such as http://127.0.0.1:4317;
    empty: nothing is traced."""

    @property
    def kafka_tls(self) -> ClientTls | None:
        """How the brokers are connected to; None is without encryption."""
        if self.kafka_ca is None and self.kafka_certificate is None and self.kafka_key is None:
            return None
        from thumbwheel.tls import ClientTls  # with gRPC behind it, which `--help` needs not wait for

        return ClientTls(self.kafka_ca, self.kafka_certificate, self.kafka_key)

    @property
    def keys_path(self) -> Path:
        """Folder of the signing keys."""
        return self.home / "keys"

    @property
    def store_path(self) -> Path:
        """Folder of the published versions."""
        return self.home / "store"


class ServerSettings(Settings):
    """What a process that applications call needs to know as well."""

    require_api_keys: bool = False
    """Answer only calls that carry an API key; `thumbwheel keys create` makes one."""

    tls_certificate: Path | None = None
    """PEM file of this server's certificate chain; given with `tls_key`, calls are encrypted."""

    tls_key: Path | None = None
    """PEM file of the certificate's private key."""

    tls_client_ca: Path | None = None
    """PEM file of the authorities whose certificates clients must have (mutual TLS)."""

    probe_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a second server, on the same host as `listen`, that answers health checks alone and without TLS, for
    probes that speak none, such as Kubernetes' own; left out: none."""

    allow_insecure: bool = False
    """Serve other machines without TLS, or without API keys or client certificates; else that is refused."""

    tenant_calls_per_second: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Calls that one tenant may begin in a second; 0 is no limit."""

    tenant_calls_at_once: int = Field(default=0, ge=0)
    """Calls that one tenant may have in flight at this server; 0 is no limit."""


def _explain(error: ValidationError, prog: str) -> NoReturn:
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        flag = "--" + field.replace("_", "-")
        message = f"{prog}: {flag} (or THUMBWHEEL_{field.upper()}): {problem['msg']}"
        found = "" if problem["type"] == "missing" else f"; it is {problem['input']!r}"
        print(f"{message}{found}.", file=sys.stderr)
    print(f"See `{prog} --help`.", file=sys.stderr)
    raise SystemExit(2)
