"""What was picked to be shown to whom, and with which probability: a vote on it carries that probability."""

from __future__ import annotations

import math
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, insert, select

from services.collector.identity import item_of
from services.collector.outbox import now_micros
from services.collector.rights import tombstones
from services.collector.submission import Submission
from services.collector.tables import shown
from thumbwheel import errors

_TOLERANCE = 1e-4
"""A probability travels in 32 bits."""


_SHOWN = select(shown.c.first_id, shown.c.propensity).where(
    shown.c.tenant == bindparam("of_tenant"),
    shown.c.user_id == bindparam("of_user"),
    shown.c.item == bindparam("of_item"),
)


class Pair(NamedTuple):
    """Two generations in the order of display."""

    first: str
    second: str

    @property
    def item(self) -> bytes:
        """The pair, whichever is shown first."""
        return item_of("comparison", self)


def note(connection: Connection, tenant: str, user_id: str, pair: Pair, propensity: float, strategy: str) -> bool:
    """Notes that a pair is shown. False where this user has been shown it before: nothing is noted.

    Raises `errors.FailedPrecondition` for a user who was forgotten.
    """
    tombstones.refuse_user(connection, tenant, user_id, field="user_id")
    here = (shown.c.tenant == tenant) & (shown.c.user_id == user_id) & (shown.c.item == pair.item)
    if connection.execute(select(shown.c.item).where(here)).one_or_none() is not None:
        return False
    connection.execute(
        insert(shown),
        {
            "tenant": tenant,
            "user_id": user_id,
            "item": pair.item,
            "first_id": pair.first,
            "second_id": pair.second,
            "propensity": propensity,
            "strategy": strategy,
            "shown_at": now_micros(),
        },
    )
    return True


def propensity_of(connection: Connection, submission: Submission) -> float | None:
    """The probability with which what is compared was shown: as it was noted, else as the client says; None: not known.

    Raises `errors.InvalidArgument` where the client says another one than was noted.
    """
    if submission.kind != "comparison":
        return None
    vote = submission.feedback.comparison
    said = vote.propensity if vote.HasField("propensity") else None
    pair = Pair(*(claims.generation_id for claims in submission.claims))
    of = {"of_tenant": submission.tenant, "of_user": submission.feedback.user_id, "of_item": pair.item}
    row = connection.execute(_SHOWN, of).one_or_none()
    if row is None:
        return said
    if row.first_id != pair.first:
        fault = "belongs to the other order of display."
    elif said is not None and not math.isclose(said, row.propensity, rel_tol=_TOLERANCE):
        fault = f"is {said:g}, but NextComparison returned {row.propensity:g}."
    else:
        return float(row.propensity)
    if said is None:
        return None
    raise errors.InvalidArgument(
        fault,
        field="feedback.comparison.propensity",
        remedy="Send the responses in the order in which they were shown, with the propensity they came with, or none.",
    )
