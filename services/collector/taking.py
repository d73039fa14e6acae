"""The second stage: what was acknowledged becomes part of the record, in its order.

    inbox ──▶ one transaction: ranks · joins · curation · feedback · outbox ──▶ the door takes it out of the inbox

A row leaves the inbox once the transaction that records it is durable. Who dies in between leaves it in both, and it is
passed over the next time: each counts exactly once.

`python -m services.collector.taking` does so for a collector, in a process of its own and at a lower priority, so that
acknowledging goes first. On its standard input come one line of JSON with what it needs, and then a line with a number
for each time that it is to take so many rows; it answers each with a line of JSON. It ends when its input does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import IO, NamedTuple, Self

from services.collector import inbox, intake
from services.collector.curation.settings import CurationSettings
from services.collector.database import Database
from services.collector.inbox import Waiting
from services.collector.intake import Curator
from services.collector.pause import RETRIED
from services.collector.records import Recorded
from services.collector.rules import Rules
from thumbwheel import errors, telemetry

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

    def dumped(self) -> bytes:
        """As one line of JSON."""
        rules = {"curation": self.rules.curation.model_dump(mode="json"), "learn_from_cut": self.rules.learn_from_cut}
        return json.dumps({"database": self.database, "rules": rules, "log_level": self.log_level}).encode() + b"\n"

    @classmethod
    def loaded(cls, line: bytes) -> Self:
        """Of such a line."""
        said = json.loads(line)
        curation = CurationSettings.model_validate(said["rules"]["curation"])
        return cls(said["database"], Rules(curation, said["rules"]["learn_from_cut"]), said["log_level"])


def serve(orders: IO[bytes], answers: IO[bytes]) -> None:
    """Does what it is told until there are no more orders."""
    line = orders.readline()
    if not line:
        return
    order = Order.loaded(line)
    telemetry.setup_logging("collector", order.log_level)
    database = Database(order.database)
    taking = Taking(database, order.rules)
    untidy = 0
    try:
        for line in orders:
            try:
                taken = taking.take(int(line))
                untidy += len(taken.ids)
                if untidy >= _TIDY_ROWS or (untidy and not taken.ids):
                    database.tidy()
                    untidy = 0
                answer: dict[str, object] = taken._asdict()
            except RETRIED as error:
                answer = {"error": str(error)}
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
    finally:
        database.close()


def main() -> None:
    """Serves the process that started this one."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # sent to all of a terminal or container: it ends with its input
        signal.signal(signum, signal.SIG_IGN)
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        pass  # nobody is there for the answer any more
    except errors.ThumbwheelError as error:
        logger.critical("%s", error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
