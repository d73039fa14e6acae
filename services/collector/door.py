"""Where feedback comes in: group commits to the inbox, and nothing else in front of an acknowledgement.

    admit ──▶ queue ──▶ one thread: BEGIN · acknowledge all that wait · COMMIT ──▶ futures

The thread commits as soon as it is free; what has come meanwhile is the next group. It writes to the inbox alone, which
in SQLite is a file of its own, so it waits for no other writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError

from services.collector import inbox, metrics
from services.collector.acknowledge import Acknowledged, Incoming, acknowledge
from services.collector.database import Database
from services.collector.faults import require_room, too_long

T = TypeVar("T")

MAX_GROUP = 128


class _Admission(NamedTuple):
    """A submission that waits for its commit."""

    incoming: Incoming
    future: asyncio.Future[Acknowledged]
    queued_at: float


class _Drop(NamedTuple):
    """Feedback that waits to be taken out: it is recorded."""

    ids: Sequence[str]
    future: asyncio.Future[None]


class _Group:
    """What shares a commit, less what nobody waits for any more."""

    def __init__(self) -> None:
        self.admissions: list[_Admission] = []
        self.drops: list[_Drop] = []

    def add(self, one: _Admission | _Drop) -> None:
        """Puts one in."""
        if isinstance(one, _Drop):
            self.drops.append(one)
        elif not one.future.done():
            self.admissions.append(one)

    @property
    def ids(self) -> list[str]:
        """Of all feedback that is to be taken out."""
        return [id for one in self.drops for id in one.ids]


class Door:
    """Takes feedback in, for the event loop that is running when it is made. Raises what connecting raises."""

    def __init__(self, database: Database, *, max_pending: int = 4_096, timeout: float = 15.0) -> None:
        self._database = database
        self._max_pending = max_pending
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Admission | _Drop | None] = queue.SimpleQueue()
        self._closed = False
        self._opened = contextlib.ExitStack()
        self._connection = self._opened.enter_context(database.door())
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    async def admit(self, incoming: Incoming) -> Acknowledged:
        """Returns once the submission is durable. Raises what `acknowledge` refuses with, `errors.NoSpace`,
        `errors.Unavailable`, `errors.ResourceExhausted` where too many wait, and `errors.DeadlineExceeded`, after which
        it may still come in.
        """
        require_room(self._queue.qsize(), self._max_pending, "submissions", closed=self._closed)
        future: asyncio.Future[Acknowledged] = self._loop.create_future()
        return await self._wait(_Admission(incoming, future, time.perf_counter()), future)

    async def drop(self, ids: Sequence[str]) -> None:
        """Takes feedback out of the inbox that is recorded. Raises as `admit` does, but never that too many wait."""
        future: asyncio.Future[None] = self._loop.create_future()
        await self._wait(_Drop(ids, future), future)

    async def _wait(self, work: _Admission | _Drop, future: asyncio.Future[T]) -> T:
        self._queue.put(work)
        # Not `asyncio.timeout`, which costs as much as all else here.
        deadline = self._loop.call_later(self._timeout, self._expire, future)
        try:
            return await future
        finally:
            deadline.cancel()

    def close(self) -> None:
        """Makes durable what waits."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._opened.close()

    def _expire(self, future: asyncio.Future[Any]) -> None:
        if not future.done():
            future.set_exception(too_long(self._timeout))

    def _run(self) -> None:
        stop = False
        while not stop and (first := self._queue.get()) is not None:
            group = _Group()
            following: _Admission | _Drop | None = first
            while following is not None:
                group.add(following)
                if len(group.admissions) >= MAX_GROUP or self._queue.empty():
                    break
                following = self._queue.get()
            stop = following is None
            self._tell(self._committed(group))

    def _committed(self, group: _Group) -> list[tuple[Any, Any]]:
        """What became of each, by its future."""
        results = self._commit([one.incoming for one in group.admissions], group.ids)
        now = time.perf_counter()
        if group.admissions:
            metrics.COMMIT_WRITES.observe(len(group.admissions))
        for one in group.admissions:
            metrics.COMMIT_SECONDS.observe(now - one.queued_at)
        dropped = results.pop()
        futures = [one.future for one in group.admissions]
        return [*zip(futures, results, strict=True), *((one.future, dropped) for one in group.drops)]

    def _commit(self, incoming: Sequence[Incoming], ids: Sequence[str], *, again: bool = True) -> list[Any]:
        """Commits all together; where that fails, each by itself. Returns what each came to, and last the drop."""
        try:
            with self._connection.begin():
                inbox.drop(self._connection, ids)
                return [*acknowledge(self._connection, incoming), None]
        except Exception as error:  # noqa: BLE001  # it goes to the callers, whatever it is
            if len(incoming) > 1 or (incoming and ids):
                alone = [self._commit([one], ())[0] for one in incoming]
                return [*alone, self._commit([], ids)[-1]]
            # A key that exists by now: another collector on this database was faster. Run again, it is seen.
            if isinstance(error, IntegrityError) and again:
                return self._commit(incoming, ids, again=False)
            fault = self._database.translated(error) if isinstance(error, DBAPIError) else error
            return [*[fault] * len(incoming), fault]

    def _tell(self, outcomes: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """Resolves futures in their event loop, which is woken once for all."""
        if outcomes and not self._loop.is_closed():  # else nobody waits any more
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in outcomes:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
