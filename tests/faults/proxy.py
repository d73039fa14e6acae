"""A TCP proxy between two parts, which can be made to fail the ways that networks do.

    passes      as if it were not there
    delay       everything is late by a round trip of `seconds`
    loss        one in four pieces is lost and comes again after a retransmission of `seconds`
    half-open   one side believes in the connection and hears nothing: what it sends is swallowed
    partition   nothing gets through, in either direction, and nobody is told; new connections are not answered
    reset       what is there is reset, and so is whoever comes

It runs in a thread of its own, so that what it is between may block. Faults begin and end while connections are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self, TypeVar, get_args

from tests.support import free_port

Fault = Literal["passes", "delay", "loss", "half-open", "partition", "reset"]
FAULTS: tuple[Fault, ...] = get_args(Fault)[1:]

_CHUNK = 65_536
_LOST = 0.25
_START_SECONDS = 10.0

T = TypeVar("T")


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter

    def reset(self) -> None:
        """Ends both sides with RST, as a host does that knows of no such connection."""
        for writer in (self.client, self.server):
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on `port` and goes on to `target`, a port, both of this machine. `with` starts and stops it."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.port, self.target = free_port(), target
        self.fault: Fault = "passes"
        self.seconds = 0.0
        self._random = random.Random(seed)
        self._healed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many go through it now."""
        return len(self._connections)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._server = self._in_loop(lambda: asyncio.start_server(self._accept, "127.0.0.1", self.port))
        return self

    def __exit__(self, *_: object) -> None:
        self._in_loop(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_SECONDS)
        self._loop.close()

    def begin(self, fault: Fault, seconds: float = 0.2) -> None:
        """From now on the network does this."""
        self._in_loop(lambda: self._begin(fault, seconds))

    def heal(self) -> None:
        """From now on it works. Connections that a partition left half-dead are reset, as their peers would."""
        self._in_loop(lambda: self._begin("passes", 0.0))

    @contextlib.contextmanager
    def failing(self, fault: Fault, seconds: float = 0.2) -> Iterator[None]:
        """The network does this for as long as the body runs."""
        self.begin(fault, seconds)
        try:
            yield
        finally:
            self.heal()

    def _in_loop(self, make: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await make()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_START_SECONDS)

    async def _begin(self, fault: Fault, seconds: float) -> None:
        before, self.fault, self.seconds = self.fault, fault, seconds
        self._healed.set() if fault == "passes" else self._healed.clear()
        # What was swallowed is missing in the middle of a stream: those connections are of no use any more.
        if fault == "reset" or before in ("half-open", "partition"):
            for connection in list(self._connections):
                connection.reset()

    async def _end(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault == "reset":
            _Connection(writer, writer).reset()
            return
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target)
        connection = _Connection(writer, other_writer)
        self._connections.add(connection)
        try:
            there = asyncio.create_task(self._pump(reader, other_writer, outward=True))
            back = asyncio.create_task(self._pump(other_reader, writer, outward=False))
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
        finally:
            self._connections.discard(connection)
            for one in (writer, other_writer):
                one.close()

    async def _late(self, seconds: float) -> None:
        """As long, or until it heals: what is on its way then arrives."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._healed.wait(), seconds)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, outward: bool) -> None:
        while data := await reader.read(_CHUNK):
            match self.fault:
                case "delay":
                    await self._late(self.seconds / 2)
                case "loss" if self._random.random() < _LOST:
                    await self._late(self.seconds)
                case "partition":
                    continue
                case "half-open" if not outward:
                    continue
                case _:
                    pass
            writer.write(data)
            await writer.drain()
