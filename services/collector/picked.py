"""What was picked to be shown to whom, and with which probability: a vote on it carries that probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, insert, select

from services.collector import many
from services.collector.identity import item_of
from services.collector.outbox import now_micros
from services.collector.rights import tombstones
from services.collector.submission import Submission
from services.collector.tables import shown
from thumbwheel import errors

_TOLERANCE = 1e-4
"""A probability travels in 32 bits."""


_SHOWN = """
SELECT user_id, item, first_id, propensity FROM shown
WHERE tenant = :tenant AND (user_id, item) IN (VALUES :many)
"""


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


def propensities(
    connection: Connection, tenant: str, submissions: Sequence[Submission]
) -> list[float | errors.InvalidArgument | None]:
    """Of each submission the probability with which what is compared was shown: as it was noted, else as the client
    says; None: not known. An error where the client says another one than was noted.
    """
    items = items_of(submissions)
    rows = many.find(connection, _SHOWN, items, tenant=tenant)
    noted = {(user_id, bytes(item)): Noted(first, propensity) for user_id, item, first, propensity in rows}
    return propensities_by(submissions, noted)


class Noted(NamedTuple):
    """What was noted of a pair that a user was shown: the one to be shown first, and the pair's probability."""

    first: str
    propensity: float


def items_of(submissions: Sequence[Submission]) -> list[tuple[str, bytes]]:
    """The users and pairs of all comparisons."""
    return [(one.feedback.user_id, _pair(one).item) for one in submissions if one.kind == "comparison"]


def propensities_by(
    submissions: Sequence[Submission], noted: Mapping[tuple[str, bytes], Noted]
) -> list[float | errors.InvalidArgument | None]:
    """As `propensities`, by what was noted of users and pairs."""
    found: list[float | errors.InvalidArgument | None] = []
    for one in submissions:
        if one.kind != "comparison":
            found.append(None)
            continue
        vote, pair = one.feedback.comparison, _pair(one)
        said = vote.propensity if vote.HasField("propensity") else None
        # Where nothing was noted at all, the item need not be made.
        found.append(_propensity(pair, said, noted.get((one.feedback.user_id, pair.item)) if noted else None))
    return found


def _pair(submission: Submission) -> Pair:
    a, b = submission.claims
    return Pair(a.generation_id, b.generation_id)


def _propensity(pair: Pair, said: float | None, noted: Noted | None) -> float | errors.InvalidArgument | None:
    if noted is None:
        return said
    first, propensity = noted
    if first != pair.first:
        fault = "belongs to the other order of display."
    elif said is not None and not math.isclose(said, propensity, rel_tol=_TOLERANCE):
        fault = f"is {said:g}, but NextComparison returned {propensity:g}."
    else:
        return float(propensity)
    if said is None:
        return None
    return errors.InvalidArgument(
        fault,
        field="feedback.comparison.propensity",
        remedy="Send the responses in the order in which they were shown, with the propensity they came with, or none.",
    )
