"""What policy servers keep on their own disks: erased there too, before a user counts as forgotten."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import grpc.aio

from services.collector.config import CollectorSettings
from thumbwheel import errors
from thumbwheel.channels import Metadata, bearer, check_key, key_from_environment, open_channel
from thumbwheel.config import split_address
from thumbwheel.tls import ClientTls
from thumbwheel.v1.policy_pb2 import ForgetGenerationsRequest
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceStub

HASHES_A_CALL = 10_000
_CALL_SECONDS = 60.0


@dataclass(frozen=True)
class Spools:
    """The policy servers at these addresses; a name that stands for several servers, as in Kubernetes, for each."""

    addresses: Sequence[str] = ()
    tls: ClientTls | None = None
    metadata: Metadata = ()

    @classmethod
    def of(cls, settings: CollectorSettings) -> Self:
        """As the settings and the environment say. Raises `errors.FailedPrecondition`."""
        addresses = [address for address in settings.policies.split(",") if address]
        key, tls = key_from_environment(), ClientTls.from_environment()
        check_key(key, addresses, tls, allow_insecure=settings.allow_insecure)
        return cls(addresses, tls, bearer(key))

    async def erase(self, hashes: Sequence[bytes]) -> int:
        """Erases what is of these users and prompts (`thumbwheel.forgotten`) on every server. Returns how much.

        Raises `errors.Unavailable` where one does not answer: what it keeps may still be there.
        """
        some = (hashes[start : start + HASHES_A_CALL] for start in range(0, len(hashes), HASHES_A_CALL))
        return await self._everywhere([ForgetGenerationsRequest(hashes=each) for each in some])

    async def expire(self, finished_before: Mapping[str, int]) -> int:
        """Erases what is older than `Tenants.expired_before` says on every server. Returns how much.

        Raises as `erase`.
        """
        if not finished_before:
            return 0
        request = ForgetGenerationsRequest()
        for tenant, micros in finished_before.items():
            request.finished_before[tenant].FromMicroseconds(micros)
        return await self._everywhere([request])

    async def _everywhere(self, requests: Sequence[ForgetGenerationsRequest]) -> int:
        erased = 0
        for address in self.addresses if requests else ():
            for server in await _servers(address):
                erased += await self._ask(address, server, requests)
        return erased

    async def _ask(self, address: str, server: str, requests: Sequence[ForgetGenerationsRequest]) -> int:
        name = split_address(address)[0]
        options = [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)] if self.tls else []
        erased = 0
        async with open_channel(server, tls=self.tls, options=options) as channel:
            stub = PolicyServiceStub(channel)
            for request in requests:
                try:
                    answer = await stub.ForgetGenerations(request, timeout=_CALL_SECONDS, metadata=self.metadata)
                except grpc.aio.AioRpcError as error:
                    raise _unreached(address, errors.from_rpc_error(error)) from error
                erased += answer.erased
        return erased


async def _servers(address: str) -> list[str]:
    """Every server that a name stands for, by its number."""
    host, port = split_address(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unreached(address, error) from error
    numbers = sorted({str(each[4][0]) for each in found})
    return [f"[{number}]:{port}" if ":" in number else f"{number}:{port}" for number in numbers]


def _unreached(address: str, error: Exception) -> errors.Unavailable:
    return errors.Unavailable(
        f"A policy server at {address} has not erased what it keeps: {error}",
        remedy="Start it, or take it out of --policies and remove its spool; it is tried again.",
    )
