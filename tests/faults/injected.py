"""What is done to a collector and to what it talks to: each fault lasts for as long as the body runs."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import psycopg

from services.collector.sqlite import inbox_path
from tests import support
from tests.faults.cluster import Cluster
from tests.faults.proxy import Fault

COMMITTED = "SELECT coalesce(max(id), 0) FROM outbox"
"""The newest event."""

# Of a round trip: longer than a process waits for a broker or a database.
_LATE_SECONDS = 12.0

Context = contextlib.AbstractAsyncContextManager[None]


async def ask(made: Cluster, sql: str) -> int:
    """A number from the database, which may be too busy to answer at once."""
    while True:
        try:
            return int((await asyncio.to_thread(made.query, sql))[0][0])
        except (psycopg.OperationalError, sqlite3.OperationalError):
            await asyncio.sleep(0.05)


def link(name: str, fault: Fault) -> Callable[[Cluster], Context]:
    @contextlib.asynccontextmanager
    async def make(made: Cluster) -> AsyncIterator[None]:
        # What is late for a client is late for all that wait: shorter than a call's deadline.
        seconds = 1.0 if name == "clients" else _LATE_SECONDS
        with made.links[name].failing(fault, seconds):
            yield

    return make


@contextlib.asynccontextmanager
async def killed(made: Cluster) -> AsyncIterator[None]:
    made.collector.kill()
    yield
    await asyncio.to_thread(made.start_collector)


@contextlib.asynccontextmanager
async def stopped(made: Cluster) -> AsyncIterator[None]:
    with support.stopped(made.collector.popen.pid):
        yield


@contextlib.asynccontextmanager
async def without_broker(made: Cluster) -> AsyncIterator[None]:
    await asyncio.to_thread(made.kill_broker)
    yield
    made.start_broker()  # in this thread: the broker ends with the thread that started it


@contextlib.asynccontextmanager
async def without_database(made: Cluster) -> AsyncIterator[None]:
    assert made.postgres is not None
    await asyncio.to_thread(made.postgres.kill)
    yield
    await asyncio.to_thread(made.postgres.start)


@contextlib.asynccontextmanager
async def database_stopped(made: Cluster) -> AsyncIterator[None]:
    assert made.postgres is not None
    with made.postgres.stopped():
        yield


@contextlib.asynccontextmanager
async def without_memory(made: Cluster) -> AsyncIterator[None]:
    """No more memory than it has now: what asks for some fails, and the process may end of it."""
    process = psutil.Process(made.collector.popen.pid)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))
    yield
    with contextlib.suppress(psutil.NoSuchProcess):
        process.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # What supervises it would do the same where it has ended, or answers its probe no more.
    made.collector.kill()
    await asyncio.to_thread(made.start_collector)


@contextlib.asynccontextmanager
async def clock_jumps(made: Cluster) -> AsyncIterator[None]:
    """Two hours ahead, and back."""
    assert made.clock is not None
    made.clock.jump(7200)
    yield
    made.clock.jump(0)


@contextlib.asynccontextmanager
async def slow_disk(made: Cluster) -> AsyncIterator[None]:
    """Commits wait for two seconds, again and again."""
    ending = asyncio.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for file in (made.file, inbox_path(made.file)):
                other = stack.enter_context(
                    contextlib.closing(sqlite3.connect(file, timeout=60.0, isolation_level=None))
                )
                other.execute("BEGIN IMMEDIATE")
                stack.callback(other.execute, "ROLLBACK")
            time.sleep(2.0)  # that is the fault

    async def again() -> None:
        while not ending.is_set():
            await asyncio.to_thread(hold)
            await asyncio.sleep(0.1)

    holding = asyncio.create_task(again())
    try:
        yield
    finally:
        ending.set()
        await holding


@contextlib.asynccontextmanager
async def full_disk(made: Cluster) -> AsyncIterator[None]:
    filler = made.home / "filler"
    await asyncio.to_thread(fill, filler)
    try:
        yield
    finally:
        filler.unlink()


def fill(path: Path) -> None:
    """A file as large as the disk lets it be."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
