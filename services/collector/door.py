"""Where feedback comes in: group commits to the inbox, and nothing else in front of an acknowledgement.

    admit ──▶ gather ──▶ one thread: has the group checked and committed ──▶ futures

A group is what has come while the one before was committed, and what comes then, until it is as large as most of what
was in flight at that commit's end: callers who were answered come again soon, and a commit of few takes almost as long
as one of many. Whoever comes alone does not wait. What commits writes to the inbox alone, which in SQLite is a file of
its own, so it waits for no other writer.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from services.collector import metrics
from services.collector.acknowledge import Acknowledged, Result
from services.collector.admitting import Admitted, Offer, Order
from services.collector.child import Child
from services.collector.faults import require_open, require_room, too_long
from thumbwheel import errors

T = TypeVar("T")

MAX_GROUP = 128
GATHER_SECONDS = 0.01
"""Longest that a group is gathered; and after a commit, how long callers are expected again."""
QUIET_SECONDS = 0.01
"""After so long in which nobody came, and with nobody waiting, a moment is quiet."""
EXPECTED = 0.8
"""Share of those in flight at a commit's end that the next one waits for."""


class Hand(Protocol):
    """What checks and commits: `admitting.Admitting`, or its process."""

    def admit(self, offers: Sequence[Offer], recorded: Sequence[str]) -> Admitted:
        """Takes offers in, and out what is recorded."""

    def close(self) -> None:
        """Ends it."""


class AdmittingProcess(Child):
    """The first stage in a process of its own."""

    def __init__(self, order: Order) -> None:
        super().__init__("services.collector.admitting", order)

    def admit(self, offers: Sequence[Offer], recorded: Sequence[str]) -> Admitted:
        """As `Admitting.admit`. Raises as `Child.ask` does: what was offered may have come in."""
        admitted: Admitted = self.ask((offers, recorded))
        return admitted


class _Admission(NamedTuple):
    """A submission that waits for its commit."""

    offer: Offer
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
    """Takes feedback in, for the event loop that is running when it is made. Closes `hand` when it is closed."""

    def __init__(self, hand: Hand, *, max_pending: int = 4_096, timeout: float = 15.0) -> None:
        self._hand = hand
        self._max_pending = max_pending
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Admission | _Drop] = deque()
        self._coming = self._committing = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._expected, self._told_at, self._came_at = 1, 0.0, 0.0
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    async def admit(self, offer: Offer) -> Acknowledged:
        """Returns once the submission is durable. Raises what it is refused with by `Checker.check` and `acknowledge`,
        `errors.NoSpace`, `errors.ResourceExhausted` where too many wait, and `errors.Unavailable` and
        `errors.DeadlineExceeded`, after which it may still come in.
        """
        require_open(closed=self._closed)
        require_room(len(self._waiting), self._max_pending, "submissions")
        future: asyncio.Future[Acknowledged] = self._loop.create_future()
        self._came_at = time.perf_counter()
        return await self._wait(_Admission(offer, future, self._came_at), future)

    async def admit_all(self, offers: Sequence[Offer]) -> list[Result]:
        """As `admit`, of many: returns of each what it came to, or what `admit` would have raised, in their order. They
        share commits, and the deadline.
        """
        futures: list[asyncio.Future[Acknowledged]] = []
        self._came_at = time.perf_counter()
        for one in offers:
            future: asyncio.Future[Acknowledged] = self._loop.create_future()
            futures.append(future)
            try:
                require_open(closed=self._closed)
                require_room(len(self._waiting), self._max_pending, "submissions")
            except errors.ThumbwheelError as error:
                future.set_exception(error)
            else:
                self._waiting.append(_Admission(one, future, self._came_at))
        self._gather()
        deadline = self._loop.call_later(self._timeout, self._expire, *futures)
        try:
            results = await asyncio.gather(*futures, return_exceptions=True)
        finally:
            deadline.cancel()
        found: list[Result] = []
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, errors.ThumbwheelError):
                raise result
            found.append(result)
        return found

    def quiet_in(self) -> float:
        """Seconds until the moment is quiet, at the earliest; 0 where it is."""
        if self._committing or self._waiting:
            return QUIET_SECONDS
        return max(0.0, self._came_at + QUIET_SECONDS - time.perf_counter())

    async def drop(self, ids: Sequence[str]) -> None:
        """Takes feedback out of the inbox that is recorded. Raises as `admit` does, but never that too many wait."""
        require_open(closed=self._closed)
        future: asyncio.Future[None] = self._loop.create_future()
        await self._wait(_Drop(ids, future), future)

    async def _wait(self, work: _Admission | _Drop, future: asyncio.Future[T]) -> T:
        self._waiting.append(work)
        self._gather()
        # Not `asyncio.timeout`, which costs as much as all else here.
        deadline = self._loop.call_later(self._timeout, self._expire, future)
        try:
            return await future
        finally:
            deadline.cancel()

    async def close(self) -> None:
        """Makes durable what waits."""
        self._closed = True
        while self._waiting:
            self._hand_over()
        self._groups.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._hand.close)

    def _expire(self, *futures: asyncio.Future[Any]) -> None:
        for future in futures:
            if not future.done():
                future.set_exception(too_long(self._timeout))

    def _gather(self) -> None:
        """Has what waits handed over: after this round of the event loop where enough has come, else in a while."""
        if self._committing or self._coming:
            return
        if len(self._waiting) >= self._enough():
            self._coming = True
            self._loop.call_soon(self._gathered)
        elif self._timer is None:
            self._timer = self._loop.call_later(GATHER_SECONDS, self._gathered)

    def _enough(self) -> int:
        """How many are worth a commit."""
        return self._expected if time.perf_counter() - self._told_at < GATHER_SECONDS else 1

    def _gathered(self) -> None:
        self._coming = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and not self._committing:  # else they were handed over at the end
            self._hand_over()

    def _hand_over(self) -> None:
        group = _Group()
        while self._waiting and len(group.admissions) < MAX_GROUP:
            group.add(self._waiting.popleft())
        self._committing = True
        self._groups.put(group)

    def _run(self) -> None:
        while (group := self._groups.get()) is not None:
            outcomes = self._committed(group)
            if not self._loop.is_closed():  # else nobody waits any more
                self._loop.call_soon_threadsafe(self._tell, outcomes)

    def _committed(self, group: _Group) -> list[tuple[Any, Any]]:
        """What became of each, by its future."""
        admissions = group.admissions
        results: Sequence[Any]
        fault: Any
        try:
            results, fault = self._hand.admit([one.offer for one in admissions], group.ids)
        except Exception as error:  # noqa: BLE001  # it goes to the callers, whatever it is
            results, fault = [error] * len(admissions), error
        now = time.perf_counter()
        if admissions:
            metrics.COMMIT_WRITES.observe(len(admissions))
        for one in admissions:
            metrics.COMMIT_SECONDS.observe(now - one.queued_at)
        futures = [one.future for one in admissions]
        return [*zip(futures, results, strict=True), *((one.future, fault) for one in group.drops)]

    def _tell(self, outcomes: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """Resolves the futures of a group, and goes on to the next."""
        self._committing = False
        self._expected = min(MAX_GROUP, int(EXPECTED * (len(outcomes) + len(self._waiting))))
        self._told_at = time.perf_counter()
        if self._waiting:
            self._gather()
        for future, result in outcomes:
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
