"""The second stage: what was acknowledged becomes part of the record, in its order.

    inbox ──▶ one transaction: ranks · joins · curation · feedback · outbox ──▶ the door takes it out of the inbox

A row leaves the inbox once the transaction that records it is durable. Who dies in between leaves it in both, and it is
passed over the next time: each counts exactly once.

A collector has this in a process of its own (`child`), at a lower priority, so that acknowledging goes first; it is
asked to take so many rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from services.collector import inbox, intake
from services.collector.database import Database
from services.collector.inbox import Waiting
from services.collector.intake import Curator
from services.collector.pause import RETRIED
from services.collector.records import Recorded
from services.collector.rules import Rules
from thumbwheel import telemetry

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Most rows in one transaction: other writers of the record wait for it."""
NICENESS = 10
_TIDY_ROWS = 1_000
"""After so many rows, and when there are none, the inbox's log is copied into its file."""


class Taken(NamedTuple):
    """What a turn came to."""

    ids: Sequence[str]
    """Of the feedback that is recorded and is to leave the inbox: the caller sees to that before the next turn."""

    told: Sequence[tuple[str, str, int]] = ()
    """How many pieces of feedback of each kind came to stand in each state."""


class Taking:
    """Takes rows from the inbox, in the caller's thread. For one thread."""

    def __init__(self, database: Database, rules: Rules) -> None:
        self._database = database
        self._curator = Curator(rules)
        self._aside: set[str] = set()

    def take(self, limit: int = AT_ONCE) -> Taken:
        """Records the oldest rows. None left: nothing waits but what could not be recorded, which is tried again by the
        next process.

        Raises what `Database.write` raises.
        """
        recorded: list[Recorded] = []
        ids: list[str] = []
        # Where none of them could be recorded, others may.
        while not ids and (rows := self._oldest(limit)):
            recorded = self._recorded(rows)
            ids = [row.feedback_id for row in rows if row.feedback_id not in self._aside]
        told = Counter((one.kind, one.state) for one in recorded)
        return Taken(ids, [(kind, state, count) for (kind, state), count in sorted(told.items())])

    def drain(self) -> None:
        """Records all that waits, where no door is open: by an operator's command."""
        while ids := self.take().ids:
            self._database.write_inbox_now(partial(inbox.drop, ids=ids))

    def close(self) -> None:
        """Nothing is to be let go of."""

    def _oldest(self, limit: int) -> list[Waiting]:
        found = self._database.read_now(partial(inbox.oldest, limit=limit + len(self._aside)))
        return [row for row in found if row.feedback_id not in self._aside][:limit]

    def _recorded(self, rows: Sequence[Waiting]) -> list[Recorded]:
        try:
            recorded = self._database.write_now(partial(intake.take, rows=rows, curator=self._curator))
        except RETRIED:
            raise
        except Exception as error:
            if len(rows) > 1:
                return [one for row in rows for one in self._recorded([row])]
            # It holds up nobody, and is not lost.
            logger.exception("feedback not recorded", extra={"feedback_id": rows[0].feedback_id, "error": str(error)})
            self._aside.add(rows[0].feedback_id)
            return []
        return recorded


class Order(NamedTuple):
    """What the process needs to know."""

    database: str
    rules: Rules
    log_level: str


@contextlib.contextmanager
def opened(order: Order) -> Iterator[Callable[[int], Taken]]:
    """What answers the clerk."""
    os.nice(NICENESS)
    telemetry.setup_logging("collector", order.log_level)
    database = Database(order.database)
    taking = Taking(database, order.rules)
    untidy = 0

    def take(limit: int) -> Taken:
        nonlocal untidy
        taken = taking.take(limit)
        untidy += len(taken.ids)
        if untidy >= _TIDY_ROWS or (untidy and not taken.ids):
            database.tidy()
            untidy = 0
        return taken

    try:
        yield take
    finally:
        database.close()
