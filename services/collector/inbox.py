"""What was acknowledged and is still to be recorded: durable, found by whoever asks, and taken out in its order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, select, text

from services.collector import many
from services.collector.emit import time_of
from services.collector.submission import Submission, receipts_of
from services.collector.tables import inbox
from thumbwheel.v1.policy_pb2 import ReceiptClaims
from thumbwheel.v1.preference_pb2 import Feedback, FeedbackRecord, FeedbackState

RECEIVED = "received"
"""The reason with which it is told as held."""


class Waiting(NamedTuple):
    """A row of the inbox."""

    feedback_id: str
    tenant: str
    idempotency_key: str
    body_sha256: bytes
    user_id: str
    kind: str
    body: bytes
    prompt_id: str
    consent: bool
    propensity: float | None
    traceparent: str
    received_at: int
    seq: int = 0
    """Given by the database."""


_NEW = Waiting._fields[:-1]
_OLDEST = text(f"SELECT {', '.join(Waiting._fields)} FROM door.inbox WHERE seq > :after ORDER BY seq LIMIT :limit")
# Not by their numbers: once it is empty, SQLite gives them out again.
_DROP = "DELETE FROM door.inbox WHERE feedback_id IN (:many)"


def put(connection: Connection, rows: Sequence[Waiting]) -> None:
    """Puts rows in, in their order."""
    if rows:
        mark = "?" if connection.dialect.name == "sqlite" else "%s"
        values = tuple([value for row in rows for value in row[:-1]])
        connection.exec_driver_sql(_put(len(rows), mark), values).close()


@functools.lru_cache(maxsize=512)
def _put(count: int, mark: str) -> str:
    """The statement for so many rows. One for all, and for the driver as it is: SQLite's lets go of the interpreter at
    each row, and in a busy server waits to have it again; and what SQLAlchemy adds to each value takes longer than
    writing it.
    """
    row = f"({', '.join([mark] * len(_NEW))})"
    return f"INSERT INTO door.inbox ({', '.join(_NEW)}) VALUES {', '.join([row] * count)}"


def oldest(connection: Connection, limit: int, after: int = 0) -> list[Waiting]:
    """The first rows behind `after`, in the order in which they are to be recorded."""
    return [Waiting(*row) for row in connection.execute(_OLDEST, {"after": after, "limit": limit})]


def drop(connection: Connection, ids: Sequence[str]) -> None:
    """Takes the rows of this feedback out."""
    many.run(connection, _DROP, ids)


def holds(connection: Connection, tenant: str, feedback_id: str) -> bool:
    """Whether this feedback waits."""
    here = (inbox.c.feedback_id == feedback_id) & (inbox.c.tenant == tenant)
    return connection.execute(select(inbox.c.seq).where(here)).first() is not None


def holds_of(connection: Connection, tenant: str, user_id: str) -> bool:
    """Whether feedback of this user waits."""
    return connection.execute(select(inbox.c.seq).where(*_of(tenant, user_id)).limit(1)).first() is not None


def users(connection: Connection) -> list[tuple[str, str]]:
    """The tenant and the id of everybody whose feedback waits."""
    return [(tenant, user) for tenant, user in connection.execute(select(inbox.c.tenant, inbox.c.user_id).distinct())]


def erase(connection: Connection, tenant: str, user_id: str) -> None:
    """Takes out what waits of a user."""
    connection.execute(delete(inbox).where(*_of(tenant, user_id)))


def _of(tenant: str, user_id: str) -> tuple[ColumnElement[bool], ...]:
    return inbox.c.tenant == tenant, inbox.c.user_id == user_id


def submission_of(row: Any) -> Submission:
    """The submission in a row, of the inbox or of the record: what was checked before it came in."""
    body = Feedback.FromString(row.body)
    claims = tuple(ReceiptClaims.FromString(receipt.claims) for _, receipt in receipts_of(body))
    return Submission(row.tenant, body, row.body, row.body_sha256, row.kind, claims, row.consent)


def record_of(row: Any) -> FeedbackRecord:
    """What callers see of a row."""
    return FeedbackRecord(
        feedback_id=row.feedback_id,
        tenant=row.tenant,
        feedback=Feedback.FromString(row.body),
        state=FeedbackState.FEEDBACK_STATE_HELD,
        reason=RECEIVED,
        received_at=time_of(row.received_at),
    )
