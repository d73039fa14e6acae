"""Keeps the second stage going: starts its process, gives it turns while anything waits, and starts it again.

    an acknowledgement ──▶ wake ──▶ a turn of the record's writer: the process records some rows ──▶ the door drops them
                                         ▲                                                              │
                                         └──────────────────── until none are left ─────────────────────┘

In a turn nothing else of this collector writes the record, and nothing but the door writes to the inbox: SQLite has one
lock for each, and who has to ask for it again waits long. While feedback comes in as fast as it is acknowledged, turns
wait for a moment: of two cores, recording takes a quarter of what acknowledging could have, whatever its priority.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from services.collector import metrics
from services.collector.child import Child
from services.collector.database import Database, Work
from services.collector.door import Door
from services.collector.pause import RETRIED, Pause
from services.collector.taking import AT_ONCE, Order, Taken
from thumbwheel import errors

logger = logging.getLogger(__name__)

_OTHERS_SECONDS = 5.0
_GATHER_SECONDS = 0.05
"""A turn of one row takes nearly as long as one of many: so long they gather, where nobody waits for them."""
_GIVE_WAY_SECONDS = 2.0
"""Longest that what was acknowledged waits for a moment in which nobody comes."""
_LOOK_SECONDS = 0.25
"""How often to look whether another collector on this database has recorded what is waited for."""


class Hand(Protocol):
    """What takes rows from the inbox: `taking.Taking`, or its process."""

    def take(self, limit: int) -> Taken:
        """Records the oldest rows."""

    def close(self) -> None:
        """Ends it."""


class TakingProcess(Child):
    """The second stage in a process of its own."""

    def __init__(self, order: Order) -> None:
        super().__init__("services.collector.taking", order)

    def take(self, limit: int) -> Taken:
        """As `Taking.take`. Raises as `Child.ask` does: rows may have been recorded."""
        taken: Taken = self.ask(limit)
        return taken


class Clerk:
    """Has recorded what is acknowledged. `committed` is called after each commit that is to be published."""

    def __init__(
        self, database: Database, door: Door, hand: Hand, committed: Callable[[], None], longest_pause: float
    ) -> None:
        self._database = database
        self._door = door
        self._hand = hand
        self._committed = committed
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._turned = asyncio.Condition()
        self._pause = Pause(longest_pause)
        self._woken_at = 0.0

    def wake(self) -> None:
        """Something was acknowledged."""
        if not self._wake.is_set():
            self._woken_at = time.monotonic()
            self._wake.set()

    async def run(self) -> None:
        """Has all recorded that waits, until it is cancelled."""
        try:
            while True:
                latest = self._woken_at + _GIVE_WAY_SECONDS
                await self._give_way(latest)
                self._wake.clear()
                self._hurry.clear()
                try:
                    while len((await self._turn()).ids) == AT_ONCE:
                        self._pause.reset()
                        await self._give_way(latest)
                except RETRIED as error:
                    logger.warning("recording waits", extra={"error": str(error), "seconds": self._pause.seconds})
                    await self._pause.wait()
                    continue
                self._pause.reset()
                # What another collector acknowledged that has ended since is recorded, too.
                await _set_within(self._wake, _OTHERS_SECONDS)
                await _set_within(self._hurry, _GATHER_SECONDS)
        finally:
            await asyncio.to_thread(self._hand.close)

    async def settled(self, waits: Work[bool], timeout: float) -> None:
        """Returns when `waits`, which looks into the inbox, says that what it looks for is recorded.

        Raises `errors.DeadlineExceeded`, and what `Database.read` raises.
        """
        try:
            async with asyncio.timeout(timeout):
                while await self._database.read(waits):
                    self._hurry.set()
                    self._wake.set()
                    await self._turn_ends()
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"What was acknowledged before was not recorded within {timeout:g} s.",
                remedy="Send it again; see thumbwheel_collector_inbox_depth, and the log where it does not fall.",
            ) from None

    async def _give_way(self, latest: float) -> None:
        """Waits for a moment in which nobody comes, unless somebody waits for what is to be recorded."""
        while not self._hurry.is_set() and (quiet := self._door.quiet_in()) and time.monotonic() < latest:
            await _set_within(self._hurry, quiet)

    async def _turn(self) -> Taken:
        taken: Taken = await self._database.turn(self._take)
        for kind, state, count in taken.told:
            metrics.FEEDBACK.labels(kind, state).inc(count)
        if taken.ids:
            self._committed()
            await self._door.drop(taken.ids)
            async with self._turned:
                self._turned.notify_all()
        return taken

    def _take(self) -> Taken:
        return self._hand.take(AT_ONCE)

    async def _turn_ends(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS), self._turned:
                await self._turned.wait()


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, and after so long at the latest."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
