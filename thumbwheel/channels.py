"""Channels to a service: opened, pooled, and tried again where that is safe."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind

from thumbwheel import calls, errors, tracing
from thumbwheel.calls import MAX_MESSAGE_BYTES
from thumbwheel.config import is_loopback, split_address
from thumbwheel.tls import ClientTls

API_KEY_VARIABLE = "THUMBWHEEL_API_KEY"

# No retry policy here: gRPC's own would try again also where the server's pause is longer than the deadline.
_SERVICE_CONFIG: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Less than all attempts at a call take: when a server is back, one of them meets it.
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
# What grpc.aio says of a call that the server ended while a request was being sent, whatever the server said.
_WRITE_FAILED = "Internal error from Core"
_ATTEMPTS = 5
_LEAST_PAUSE = 0.05
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 3.0

Request = TypeVar("Request")
Response = TypeVar("Response")
Stub = TypeVar("Stub")
Metadata = tuple[tuple[str, str], ...]


def open_channel(
    address: str, *, tls: ClientTls | None = None, options: Sequence[tuple[str, int | str]] = ()
) -> grpc.aio.Channel:
    """A channel to "host:port", encrypted where `tls` is given. Does not wait for the server."""
    everything = list({**dict(_OPTIONS), **dict(options)}.items())
    if tls is None:
        return grpc.aio.insecure_channel(address, options=everything)
    return grpc.aio.secure_channel(address, tls.credentials(), options=everything)


class Pool(Generic[Stub]):
    """Stubs on `size` connections to one address, taken in turn: one connection's packets are one thread's work."""

    def __init__(
        self, address: str, make: Callable[[grpc.aio.Channel], Stub], *, size: int, tls: ClientTls | None
    ) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)] if size > 1 else []  # or they would share one connection
        self._channels = [open_channel(address, tls=tls, options=own) for _ in range(size)]
        self._stubs = itertools.cycle([make(channel) for channel in self._channels])

    @property
    def stub(self) -> Stub:
        """The next one."""
        return next(self._stubs)

    async def close(self) -> None:
        """Closes the connections; calls in flight are cancelled."""
        for channel in self._channels:
            await channel.close()


def check_key(api_key: str, addresses: Sequence[str], tls: ClientTls | None, *, allow_insecure: bool) -> None:
    """Raises `errors.FailedPrecondition` where an API key would cross the network for all to read."""
    if not api_key or tls is not None or allow_insecure:
        return
    for address in addresses:
        if not is_loopback(split_address(address)[0]):
            raise errors.FailedPrecondition(
                f"The API key would go to {address} unencrypted.",
                remedy="Give `tls`, or accept the risk with `allow_insecure=True`.",
            )


def key_from_environment() -> str:
    """The API key of THUMBWHEEL_API_KEY; "" where there is none."""
    return os.environ.get(API_KEY_VARIABLE, "")


def bearer(api_key: str) -> Metadata:
    """What a call with this API key carries; nothing where there is none."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def call_error(error: grpc.aio.AioRpcError | asyncio.CancelledError) -> errors.ThumbwheelError:
    """The typed error of a call that failed. Raises `error` itself where it is the task that was cancelled.

    A call that breaks while a request is being sent cancels itself, and grpc.aio reports that as it reports the task's
    own cancellation; or it says "internal error", whatever the server said.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise error
    elif error.details() != _WRITE_FAILED:
        return errors.from_rpc_error(error)
    return errors.Unavailable("The server ended the call while it was written to.", remedy="Try again.")


class Attempts:
    """The attempts at one call, under one deadline: `timeout` seconds, or what the call being handled has left.

    Tried again are `errors.Unavailable`, and `errors.ResourceExhausted` where the server says when. To be used only for
    calls that may be made twice.
    """

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + calls.bounded(timeout)
        self._made = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline, for the next attempt."""
        return max(0.001, self._deadline - time.monotonic())

    def reset(self) -> None:
        """It went well for a while: the next pause is short again, and the count begins anew."""
        self._made = 0

    async def again(self, error: grpc.aio.AioRpcError | asyncio.CancelledError) -> None:
        """Waits until the next attempt. Raises the typed error where there is to be none."""
        typed = call_error(error)
        self._made += 1
        pause = min(_FIRST_PAUSE * 2 ** (self._made - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if isinstance(typed, errors.ResourceExhausted) and typed.retry_after > 0:
            # The server is there and says when: only the deadline ends that. Not all come back at once.
            pause = max(_LEAST_PAUSE, typed.retry_after) * random.uniform(1.0, 1.5)
        elif not isinstance(typed, errors.Unavailable) or self._made >= _ATTEMPTS:
            raise typed from error
        if pause >= self.left:
            raise typed from error
        await asyncio.sleep(pause)


async def unary(
    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request, *, timeout: float, metadata: Metadata
) -> Response:
    """One call that may be made twice, tried again where it failed for the moment. Raises our errors."""
    attempts = Attempts(timeout)
    with tracing.span(type(request).__name__.removesuffix("Request"), kind=SpanKind.CLIENT):
        metadata = (*metadata, *tracing.outgoing())
        while True:
            try:
                return await method(request, timeout=attempts.left, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                await attempts.again(error)
