"""Who may call: what a server asks of each call before any of its own code runs.

TLS handshake ──▶ API key: known, of the scope ──▶ its tenant ──▶ the tenant's quotas ──▶ the call
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

import grpc.aio

from thumbwheel import calls, errors
from thumbwheel.apikeys import KeyRing, Scope
from thumbwheel.calls import DEFAULT_TENANT, TENANT_KEY, Caller
from thumbwheel.config import ServerSettings, is_loopback, split_address
from thumbwheel.quotas import Quotas
from thumbwheel.tls import ServerTls

AUTHORIZATION = "authorization"
_BEARER = "Bearer "
_SCOPES: dict[str, Scope] = {
    "thumbwheel.v1.PolicyService": "generate",
    "thumbwheel.v1.RewardService": "score",
    "thumbwheel.v1.PreferenceService": "feedback",
}
CONTROL_METHODS: dict[str, Scope] = {
    "/thumbwheel.v1.PreferenceService/Forget": "control",
    "/thumbwheel.v1.PolicyService/ForgetGenerations": "control",
    "/thumbwheel.v1.RolloutService/Promote": "admin",
    "/thumbwheel.v1.RolloutService/Rollback": "admin",
}
"""The control plane, and which scope opens what: what decides for all users, or cannot be undone."""
Plane: TypeAlias = Literal["data", "control"]
_WATCH_SECONDS = 1.0


def check_plane(method: str, plane: Plane) -> None:
    """Raises `errors.FailedPrecondition` where "/service/method" is not of this plane."""
    if (method in CONTROL_METHODS) != (plane == "control"):
        name, other = method.rpartition("/")[2], "data" if plane == "control" else "control"
        raise errors.FailedPrecondition(
            f"{name} is not answered on the {plane} plane.",
            remedy=f"Call it at the server's address of the {other} plane.",
        )


@dataclass(frozen=True)
class Security:
    """How a server is guarded. Without arguments: not at all, which serves this machine only."""

    keys: KeyRing | None = None
    tls: ServerTls | None = None
    quotas: Quotas = field(default_factory=Quotas)
    allow_insecure: bool = False

    @classmethod
    def load(cls, settings: ServerSettings) -> Self:
        """As the settings say. Raises `errors.FailedPrecondition` naming the setting or file that cannot be used."""
        certificate, key = settings.tls_certificate, settings.tls_key
        if (certificate is None) != (key is None):
            raise errors.FailedPrecondition("--tls-certificate and --tls-key go together.", remedy="Give both.")
        if settings.tls_client_ca is not None and certificate is None:
            raise errors.FailedPrecondition(
                "--tls-client-ca needs a certificate of the server.", remedy="Give --tls-certificate and --tls-key too."
            )
        return cls(
            keys=KeyRing(settings.keys_path) if settings.require_api_keys else None,
            tls=ServerTls(certificate, key, settings.tls_client_ca) if certificate and key else None,
            quotas=Quotas(rate=settings.tenant_calls_per_second, at_once=settings.tenant_calls_at_once),
            allow_insecure=settings.allow_insecure,
        )

    def check_address(self, listen: str) -> None:
        """Raises `errors.FailedPrecondition` where other machines could call unguarded."""
        host, _ = split_address(listen)
        if is_loopback(host) or self.allow_insecure:
            return
        missing = []
        if self.tls is None:
            missing.append("TLS (--tls-certificate, --tls-key)")
        if self.keys is None and (self.tls is None or self.tls.client_ca is None):
            missing.append("API keys (--require-api-keys) or client certificates (--tls-client-ca)")
        if missing:
            raise errors.FailedPrecondition(
                f"{listen} can be reached from other machines, and there is no {', and no '.join(missing)}.",
                remedy="Set them, listen on 127.0.0.1, or accept the risk with --allow-insecure.",
            )

    @contextlib.contextmanager
    def call(self, method: str, metadata: dict[str, str], remaining: float | None) -> Iterator[None]:
        """One call of "/service/method" with this metadata, and `remaining` seconds left; from here on its tenant's.

        Raises `errors.Unauthenticated`, `errors.PermissionDenied` and `errors.ResourceExhausted`.
        """
        caller = self._caller(method, metadata)
        calls.enter(caller, remaining)
        with self.quotas.call(caller.tenant):
            yield

    async def watch(self) -> None:
        """Background task: takes up changes of the API keys."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.keys is not None:
                await asyncio.to_thread(self.keys.reload)

    def _caller(self, method: str, metadata: dict[str, str]) -> Caller:
        asked = metadata.get(TENANT_KEY, "")
        if self.keys is None:
            return Caller(asked or DEFAULT_TENANT)
        given = metadata.get(AUTHORIZATION, "")
        if not given.startswith(_BEARER):
            raise errors.Unauthenticated(
                "This server needs an API key.",
                remedy="Send it as the metadata `authorization: Bearer tw_...`; clients take it as `api_key`.",
            )
        service = method.lstrip("/").partition("/")[0]
        scope = CONTROL_METHODS.get(method) or _SCOPES.get(service, "admin")
        key = self.keys.check(given.removeprefix(_BEARER), scope)
        if asked and asked != key.tenant and "admin" not in key.scopes:
            raise errors.PermissionDenied(
                f"The API key {key.id} is of tenant {key.tenant!r}, not {asked!r}.",
                remedy=f"Leave out the metadata {TENANT_KEY}.",
            )
        return Caller(asked or key.tenant, key.id)


def metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """What a call carries beside its request, less binary values."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
