"""What a process tells operators: structured logs on standard error, and Prometheus metrics over HTTP.

A line of the log carries the tenant of the call it was written in, and the trace where that is sampled. It carries no
prompt, response, comment or edit, whatever the level: ids lead to those, for people who may see them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Info, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from thumbwheel import calls, errors, tracing
from thumbwheel.config import Settings

logger = logging.getLogger(__name__)

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}

BUILD = Info("thumbwheel_build", "What runs here.")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is passed as `extra=` becomes keys of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line of JSON."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (caller := calls.caller()) is not None:
            line["tenant"] = caller.tenant
        if trace_id := tracing.trace_id():
            line["trace_id"] = trace_id
        line.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class SurroundingsCollector(Collector):
    """What this process has around it: disk, memory and clock, measured when asked for."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The names, for registering without measuring."""
        return (
            GaugeMetricFamily("thumbwheel_disk_free_bytes", "Free space on the disk of this process's home."),
            GaugeMetricFamily("thumbwheel_disk_size_bytes", "Size of that disk."),
            GaugeMetricFamily("thumbwheel_memory_available_bytes", "Memory to be had, here and within this cgroup."),
            GaugeMetricFamily("thumbwheel_memory_size_bytes", "All memory of this machine, or what the cgroup allows."),
            GaugeMetricFamily("thumbwheel_clock_timestamp_seconds", "What time this process takes it to be."),
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All of them; without the disk where it does not answer, so that the other metrics are still served."""
        free, size, *others = self.describe()
        there = next(path for path in (self._home, *self._home.absolute().parents) if path.exists())
        try:
            usage = shutil.disk_usage(there)
        except OSError as error:
            logger.warning("disk not measured", extra={"path": str(there), "error": str(error)})
        else:
            free.add_metric([], usage.free)
            size.add_metric([], usage.total)
            yield from (free, size)
        for family, value in zip(others, (*_memory(), time.time()), strict=True):
            family.add_metric([], value)
            yield family


def _memory() -> tuple[int, int]:
    """Bytes to be had, and all bytes: of the machine, or of the cgroup (version 2) where that has less."""
    import psutil

    machine = psutil.virtual_memory()
    cgroup = Path("/sys/fs/cgroup")
    try:
        size, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # another kind of cgroup, or one without a limit, whose file says "max"
        return machine.available, machine.total
    return min(machine.available, max(0, size - used)), min(machine.total, size)


def start(process: str, settings: Settings) -> None:
    """Logs, traces and what surrounds this process, as the settings say: once, before anything else is done."""
    setup_logging(process, settings.log_level)
    tracing.start(process, settings.trace_endpoint)
    REGISTRY.register(SurroundingsCollector(settings.home))


def setup_logging(process: str, level: str) -> None:
    """Sends all logs of this process to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("kafka", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # An endpoint that is away is said every few seconds, with a traceback.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)


@contextlib.contextmanager
def metrics_server(port: int, *, process: str, host: str = "127.0.0.1") -> Iterator[int]:
    """Serves this process's metrics at http://host:port/metrics from a thread. Yields the port.

    Raises `errors.PortInUse`.
    """
    from importlib.metadata import version

    BUILD.info({"process": process, "version": version("thumbwheel")})
    try:
        server, thread = start_http_server(port, addr=host)
    except OSError as error:
        raise errors.PortInUse(
            f"{process} cannot serve metrics on {host}:{port}: {error.strerror}.",
            remedy="Choose another port with --metrics-port, or stop the process that has it.",
        ) from error
    server.set_app(_with_colons(server.get_app()))
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)


def _with_colons(app: Any) -> Any:
    """Names keep their colons, of which vLLM's are full, also for a Prometheus before its third release.

    To who asks for OpenMetrics and does not say that UTF-8 is fine, prometheus_client 0.26 writes `vllm_` for `vllm:`.
    All names that we serve are such as any release knows, so nothing else changes.
    """

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        accepted = environ.get("HTTP_ACCEPT", "").split(",")
        environ["HTTP_ACCEPT"] = ",".join(
            f"{one};escaping=allow-utf-8" if "openmetrics-text" in one and "escaping=" not in one else one
            for one in accepted
        )
        return app(environ, start_response)

    return answer
