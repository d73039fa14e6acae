"""The first stage: what is submitted is checked, and becomes durable, many pieces in a commit.

    the door's groups ──▶ check ──▶ BEGIN · acknowledge · COMMIT ──▶ what each came to

A collector has this in a process of its own (`child`): checking and committing take the interpreter for as long as
gRPC does, which has the collector's to itself then.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.exc import DBAPIError, IntegrityError

from services.collector import inbox
from services.collector.acknowledge import Incoming, Result, acknowledge
from services.collector.database import Database
from services.collector.rights.tenants import Tenants
from services.collector.submission import Checker
from thumbwheel import errors, telemetry
from thumbwheel.auth import ReceiptKey
from thumbwheel.v1.preference_pb2 import Feedback

logger = logging.getLogger(__name__)


class Offer(NamedTuple):
    """What a tenant submits, as it came."""

    tenant: str
    feedback: bytes
    """A `Feedback`, serialised."""

    traceparent: str = ""


class Admitted(NamedTuple):
    """What a group came to."""

    results: Sequence[Result]
    """Of each offer, in their order."""

    fault: errors.ThumbwheelError | None = None
    """Why what was to leave the inbox did not."""


class Admitting:
    """Writes to the inbox, and nothing else, in the caller's thread. For one thread. Raises what connecting raises."""

    def __init__(self, database: Database, checker: Checker) -> None:
        self._database = database
        self._checker = checker
        self._opened = contextlib.ExitStack()
        self._connection = self._opened.enter_context(database.door())

    def admit(self, offers: Sequence[Offer], recorded: Sequence[str]) -> Admitted:
        """Makes all that is not refused durable, in its order, and takes what is `recorded` out, by its ids."""
        checked = [self._checked(offer) for offer in offers]
        incoming = [one for one in checked if isinstance(one, Incoming)]
        results, fault = self._commit(incoming, recorded)
        committed = iter(results)
        return Admitted([next(committed) if isinstance(one, Incoming) else one for one in checked], fault)

    def close(self) -> None:
        """Lets go of the database."""
        self._opened.close()

    def _checked(self, offer: Offer) -> Incoming | errors.ThumbwheelError:
        try:
            submission = self._checker.check(Feedback.FromString(offer.feedback), tenant=offer.tenant)
        except Exception as error:  # noqa: BLE001  # it goes to the caller, and not to the others of the group
            return self._fault(error)
        return Incoming(submission, offer.traceparent)

    def _commit(self, incoming: Sequence[Incoming], recorded: Sequence[str], *, again: bool = True) -> Admitted:
        """Commits all together; where that fails, each by itself."""
        if not incoming and not recorded:
            return Admitted([])
        try:
            with self._connection.begin():
                inbox.drop(self._connection, recorded)
                return Admitted(acknowledge(self._connection, incoming))
        except Exception as error:  # noqa: BLE001  # it goes to the callers, whatever it is
            if len(incoming) > 1 or (incoming and recorded):
                alone = [self._commit([one], ()).results[0] for one in incoming]
                return Admitted(alone, self._commit([], recorded).fault)
            # A key that exists by now: another collector on this database was faster. Run again, it is seen.
            if isinstance(error, IntegrityError) and again:
                return self._commit(incoming, recorded, again=False)
            fault = self._fault(error)
            return Admitted([fault] * len(incoming), fault)

    def _fault(self, error: Exception) -> errors.ThumbwheelError:
        if isinstance(error, DBAPIError):
            error = self._database.translated(error)
        if isinstance(error, errors.ThumbwheelError):
            return error
        logger.error("feedback not taken", exc_info=error)
        return errors.Internal(
            f"The feedback met a fault of ours: {type(error).__name__}.", remedy="The collector's log says more."
        )


class Order(NamedTuple):
    """What the process needs to know."""

    database: str
    keys: Path
    max_text_bytes: int
    tenants: Path | None
    log_level: str


@contextlib.contextmanager
def opened(order: Order) -> Iterator[Callable[[tuple[Sequence[Offer], Sequence[str]]], Admitted]]:
    """What answers the door."""
    telemetry.setup_logging("collector", order.log_level)
    checker = Checker(ReceiptKey.load(order.keys), order.max_text_bytes, Tenants.load(order.tenants))
    database = Database(order.database)
    try:
        admitting = Admitting(database, checker)
        try:
            yield lambda group: admitting.admit(*group)
        finally:
            admitting.close()
    finally:
        database.close()
