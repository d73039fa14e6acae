"""TLS: certificates of servers and clients, read from PEM files and checked where they are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from prometheus_client import Gauge

from thumbwheel import errors

logger = logging.getLogger(__name__)

EXPIRES = Gauge("thumbwheel_tls_certificate_expires_timestamp_seconds", "When this server's certificate expires.")

CA_VARIABLE = "THUMBWHEEL_CLIENT_CA"
CERTIFICATE_VARIABLE = "THUMBWHEEL_CLIENT_CERTIFICATE"
KEY_VARIABLE = "THUMBWHEEL_CLIENT_KEY"


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate chain and key; `client_ca` where clients must show a certificate too (mutual TLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a server is bound with. Renewed files are taken up at the next handshake, without a restart.

        Raises `errors.FailedPrecondition` naming the file that cannot be used.
        """
        stamps = self._stamps()
        first = self._configuration()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal stamps
            now = self._stamps()
            if now == stamps:
                return None
            try:
                configuration = self._configuration()
            except errors.FailedPrecondition as error:
                logger.error("the certificate known goes on to be used: %s", error)
                return None
            stamps = now
            logger.info("certificate reloaded", extra={"path": str(self.certificate)})
            return configuration

        fetch: Callable[[], grpc.ServerCertificateConfiguration | None] = renewed
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            first,
            fetch,  # type: ignore[arg-type]  # the stubs do not know that None is "no change"
            self.client_ca is not None,
        )
        return credentials

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        chain, key = _pair(self.certificate, self.key)
        EXPIRES.set(x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc.timestamp())
        authorities = None if self.client_ca is None else _certificates(self.client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)

    def _stamps(self) -> list[int]:
        files = [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in files]


@dataclass(frozen=True)
class ClientTls:
    """Whom a client trusts: `ca`, or the system's authorities where that is None; and who it is, for mutual TLS."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Self | None:
        """As THUMBWHEEL_CLIENT_CA, _CERTIFICATE and _KEY say; None, which is no TLS, where none of them is set."""
        ca, certificate, key = (
            Path(variables[name]) if variables.get(name) else None
            for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)
        )
        return None if ca is None and certificate is None and key is None else cls(ca, certificate, key)

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel is opened with. Raises `errors.FailedPrecondition` naming the file that cannot be used."""
        authorities, key, chain = self.read()
        credentials: grpc.ChannelCredentials = grpc.ssl_channel_credentials(authorities, key, chain)
        return credentials

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Authorities, key and chain, checked. Raises `errors.FailedPrecondition` naming the file that is unusable."""
        if (self.certificate is None) != (self.key is None):
            raise errors.FailedPrecondition(
                "A client's certificate and its key belong together, and only one is given.", remedy="Give both."
            )
        chain, key = _pair(self.certificate, self.key) if self.certificate and self.key else (None, None)
        return None if self.ca is None else _certificates(self.ca), key, chain


def _pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate chain and the key that belongs to it."""
    chain, secret = _certificates(certificate), _read(key)
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except (ValueError, TypeError) as error:
        raise _unusable(key, f"is not an unencrypted PEM private key ({error})") from error
    public = x509.load_pem_x509_certificates(chain)[0].public_key()
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(encoding, form) != public.public_bytes(encoding, form):
        raise _unusable(key, f"is not the key of {certificate}")
    return chain, secret


def _certificates(path: Path) -> bytes:
    data = _read(path)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise _unusable(path, f"has no PEM certificate ({error})") from error
    if (end := found[0].not_valid_after_utc) <= datetime.now(UTC):
        raise _unusable(path, f"expired on {end.date()}")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from error


def _unusable(path: Path, fault: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"{path} {fault}.", remedy="Give the right file, or a new certificate.")
