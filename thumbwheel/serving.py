"""The life of a gRPC server, the same for every service.

start metrics → bind → background tasks → SERVING … SIGTERM → NOT_SERVING → drain → stop

Background tasks are supervised: one that raises, or ends when nobody asked it to, stops the process with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent import futures
from types import TracebackType
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import Counter, Gauge, Histogram

from thumbwheel import access, calls, errors, telemetry, tracing
from thumbwheel.access import Plane, Security, metadata
from thumbwheel.calls import DEFAULT_TENANT, MAX_MESSAGE_BYTES
from thumbwheel.calls import TENANT_KEY as TENANT_KEY  # what `tenant` reads
from thumbwheel.config import split_address

logger = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # A client that is gone without a word is noticed, and what it asked for ends, within 50 seconds.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]

HANDLED = Counter(
    "grpc_server_handled_total", "Calls finished, by status.", ["grpc_service", "grpc_method", "grpc_code"]
)
STARTED = Counter("grpc_server_started_total", "Calls begun.", ["grpc_service", "grpc_method"])
HANDLING = Histogram(
    "grpc_server_handling_seconds",
    "Time from the start of a call to its end.",
    ["grpc_service", "grpc_method"],
    buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
IN_FLIGHT = Gauge("thumbwheel_calls_in_flight", "Calls being handled now.")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Register = Callable[[grpc.aio.Server], None]
Background = Callable[[], Awaitable[None]]


def tenant(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The tenant of a call: that of its API key, or what its metadata says where no key is needed."""
    if (caller := calls.caller()) is not None:
        return caller.tenant
    return metadata(context).get(TENANT_KEY, DEFAULT_TENANT)


class _Call:
    """Guards, counts and times one call, and turns our exceptions into statuses with details. For `async with`."""

    # A class, and labels looked up once a method: of a short call, this is a good part.
    __slots__ = ("_context", "_guard", "_metadata", "_method", "_plane", "_span", "_started")

    def __init__(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], security: Security, plane: Plane | None
    ) -> None:
        self._method = method
        self._context = context
        self._metadata = metadata(context)
        self._guard = security.call(method, self._metadata, context.time_remaining())
        self._plane = plane

    async def __aenter__(self) -> None:
        _started(self._method).inc()
        IN_FLIGHT.inc()
        self._started = time.perf_counter()
        self._span = tracing.begin_call(self._method, tracing.of_metadata(self._metadata.items()))
        try:
            if self._plane is not None:
                access.check_plane(self._method, self._plane)
            self._guard.__enter__()
        except errors.ThumbwheelError as error:
            await self._end(error)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.__exit__(kind, error, trace)
        await self._end(error)

    async def _end(self, error: BaseException | None) -> None:
        code = grpc.StatusCode.OK
        try:
            match error:
                case None:
                    pass
                case errors.ThumbwheelError():
                    code = error.code
                    details = errors.to_status(error).SerializeToString()
                    self._context.set_trailing_metadata((("grpc-status-details-bin", details),))
                    await self._context.abort(code, str(error))
                case asyncio.CancelledError():
                    code = grpc.StatusCode.CANCELLED
                case grpc.aio.AbortError():
                    code = self._context.code()
                case Exception():
                    code = grpc.StatusCode.INTERNAL
                    logger.error("%s failed", self._method, exc_info=error)
                    name = self._method.rpartition("/")[2]
                    await self._context.abort(code, f"{name} failed inside the service; its log says why.")
        finally:
            IN_FLIGHT.dec()
            _handled(self._method, code.name).inc()
            _handling(self._method).observe(time.perf_counter() - self._started, tracing.exemplar())
            if self._span is not None:
                tracing.end_call(self._span, code.name)


@functools.cache
def _started(method: str) -> Counter:
    return STARTED.labels(*method.lstrip("/").split("/"))


@functools.cache
def _handled(method: str, code: str) -> Counter:
    return HANDLED.labels(*method.lstrip("/").split("/"), code)


@functools.cache
def _handling(method: str) -> Histogram:
    return HANDLING.labels(*method.lstrip("/").split("/"))


class _Guarded(grpc.GenericRpcHandler):
    """Handlers that wrap others: each method is wrapped when it is first called."""

    def __init__(self, inner: grpc.GenericRpcHandler, wrap: Callable[[str, Handler], Handler]) -> None:
        self._inner = inner
        self._wrap = wrap
        self._wrapped: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a method; None where there is none."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = self._inner.service(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]


def guarded(server: grpc.aio.Server, security: Security | None = None, plane: Plane | None = None) -> grpc.aio.Server:
    """What handlers are added to that are to be guarded, counted and timed: each, unary or streaming, is wrapped in
    `_Call`. With a `plane`, only its methods are answered. What is added to `server` itself is left alone.

    Not an interceptor: gRPC runs those anew at each call, which takes longer than all that they would do here.
    """
    call = functools.partial(_Call, security=security or Security(), plane=plane)
    return cast("grpc.aio.Server", _Adding(server, functools.partial(_wrapped, call=call)))


class _Adding:
    """Adds handlers to a server, wrapped."""

    def __init__(self, server: grpc.aio.Server, wrap: Callable[[str, Handler], Handler]) -> None:
        self._server = server
        self._wrap = wrap

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As gRPC's own."""
        self._server.add_generic_rpc_handlers([_Guarded(one, self._wrap) for one in generic_rpc_handlers])

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """As gRPC's own."""
        wrapped = {name: self._wrap(f"/{service_name}/{name}", handler) for name, handler in method_handlers.items()}
        self._server.add_registered_method_handlers(service_name, wrapped)


def _wrapped(method: str, inner: Any, call: Callable[..., _Call]) -> Handler:
    if inner.response_streaming:
        produce = inner.stream_stream if inner.request_streaming else inner.unary_stream

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with call(method, context), contextlib.aclosing(produce(request, context)) as responses:
                async for response in responses:
                    yield response

        make: Any = (
            grpc.stream_stream_rpc_method_handler if inner.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        streaming: Handler = make(stream, inner.request_deserializer, inner.response_serializer)
        return streaming
    answer = inner.stream_unary if inner.request_streaming else inner.unary_unary

    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with call(method, context):
            return await answer(request, context)

    make = grpc.stream_unary_rpc_method_handler if inner.request_streaming else grpc.unary_unary_rpc_method_handler
    single: Handler = make(unary, inner.request_deserializer, inner.response_serializer)
    return single


def _bind(
    server: grpc.aio.Server | grpc.Server, listen: str, process: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    try:
        port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise _taken(process, listen)
    return port


def _taken(process: str, listen: str) -> errors.PortInUse:
    return errors.PortInUse(
        f"{process} cannot listen on {listen}: the port is taken.",
        remedy="Choose another with --listen, or stop the process that has it.",
    )


def check_port(process: str, listen: str) -> None:
    """Raises `errors.PortInUse` where another process listens there. To be asked before anything that takes long."""
    host, port = split_address(listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _taken(process, listen) from error


async def serve(
    *,
    process: str,
    listen: str,
    metrics_port: int,
    services: Sequence[str],
    register: Register,
    background: Mapping[str, Background],
    drained: Background | None = None,
    drain_seconds: float = 30.0,
    security: Security | None = None,
    stopping: Callable[[], None] | None = None,
    probe_port: int | None = None,
    control_listen: str | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; then refuses new calls, lets those in flight end, and returns.

    With `control_listen`, the methods of the control plane (`access.CONTROL_METHODS`) are answered there and nowhere
    else. With `probe_port`, a second server answers health checks alone, without TLS.

    `services` are full gRPC names, for health and reflection. Without `security` there are neither keys nor TLS, and
    only this machine is served. Raises `errors.PortInUse`, `errors.FailedPrecondition` for an address that other
    machines could call unguarded or a certificate that cannot be used, or whatever stopped a background task. Calls
    still running `drain_seconds` after the signal are cancelled: `stopping` is called first, for those that would never
    end; `drained` is awaited when the last has ended and background tasks still run.
    """
    host, _ = split_address(listen)
    security = security or Security()
    at: dict[Plane | None, str] = {None: listen}
    if control_listen is not None:
        at = {"data": listen, "control": control_listen}
    for address in at.values():
        security.check_address(address)
    credentials = None if security.tls is None else security.tls.credentials()
    if security.keys is not None:
        background = {**background, "api-keys": security.watch}
    with telemetry.metrics_server(metrics_port, process=process, host=host) as bound_metrics_port:
        health_servicer = health.aio.HealthServicer()
        servers, ports = [], []
        for plane, address in at.items():
            server = grpc.aio.server(options=_OPTIONS)
            register(guarded(server, security, plane))
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
            reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
            ports.append(_bind(server, address, process, credentials))
            servers.append(server)
        if probe_port is not None:
            servers.append(grpc.aio.server(options=_OPTIONS))
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, servers[-1])
            _bind(servers[-1], f"{host}:{probe_port}", process)
        with _stop_signals() as stop:
            tasks = {asyncio.create_task(_forever(run), name=name) for name, run in background.items()}
            signalled = asyncio.create_task(stop.wait(), name="stop")
            try:
                for server in servers:
                    await server.start()
                # All that is loaded by now stays: to look through it again would stop every call for a while.
                gc.collect()
                gc.freeze()
                for name in ("", *services):
                    await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
                logger.info("serving", extra={"address": f"{host}:{ports[0]}", "metrics_port": bound_metrics_port})
                done, _ = await asyncio.wait({signalled, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {signalled}:
                    logger.critical("background task %s stopped", task.get_name(), exc_info=task.exception())
                    raise errors.Internal(f"{process} stopped: its task {task.get_name()} ended: {task.exception()}.")
            finally:
                await health_servicer.enter_graceful_shutdown()
                if stopping is not None:
                    stopping()
                await asyncio.gather(*(server.stop(drain_seconds) for server in servers))
                if drained is not None and signalled.done():
                    await drained()
                for task in (*tasks, signalled):
                    task.cancel()
                await asyncio.gather(*tasks, signalled, return_exceptions=True)
                logger.info("stopped")


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    try:
        yield stop
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)


async def _forever(run: Background) -> None:
    await run()
    raise errors.Internal("It returned, but was meant to run for ever.")


@contextlib.contextmanager
def health_server(*, process: str, listen: str, metrics_port: int) -> Iterator[Callable[[bool], None]]:
    """Health and metrics for a process that is not asyncio, served from threads. Yields the switch: ready or not."""
    host, _ = split_address(listen)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="health"), options=_OPTIONS)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

    def ready(serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        servicer.set("", status.SERVING if serving else status.NOT_SERVING)

    with telemetry.metrics_server(metrics_port, process=process, host=host):
        _bind(server, listen, process)
        ready(False)
        server.start()
        try:
            yield ready
        finally:
            servicer.enter_graceful_shutdown()
            server.stop(1.0).wait(5.0)


def run(process: str, main: Awaitable[None]) -> None:
    """Runs a service to its end. A known error is logged and ends the process with status 1."""
    import uvloop

    async def _main() -> None:
        await main

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main())
    except errors.ThumbwheelError as error:
        logger.critical("%s", error)
        raise SystemExit(1) from None
