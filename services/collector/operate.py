"""What operators do, on the database itself: whoever can open it may. A collector that runs on it goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

from sqlalchemy import Connection, insert, select, update

from services.collector import outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.decide import decide
from services.collector.rules import Rules
from services.collector.tables import feedback, feedback_generations, gold
from services.collector.taking import Taking
from thumbwheel import errors

BEGINNING = "beginning"
OPERATOR_SECONDS = 3_600.0
"""Putting back a backup, or marking a whole outbox, may take long."""


@asynccontextmanager
async def opened(settings: CollectorSettings) -> AsyncIterator[Database]:
    """The database of these settings."""
    database = await asyncio.to_thread(Database, settings.database_url, timeout=OPERATOR_SECONDS)
    try:
        yield database
    finally:
        await asyncio.to_thread(database.close)


def since(text: str) -> int:
    """A time as microseconds since the epoch: `beginning`, or ISO 8601; without a zone, it is UTC.

    Raises `errors.InvalidArgument`.
    """
    if text == BEGINNING:
        return 0
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise errors.InvalidArgument(
            f"is {text!r}.", field="--from", remedy=f"Give {BEGINNING}, or a time such as 2026-01-31T12:00:00."
        ) from error
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1e6)


async def recorded(database: Database, rules: Rules) -> None:
    """Records what was acknowledged and waits, so that what follows sees all of it; a collector may do so meanwhile."""
    await asyncio.to_thread(Taking(database, rules).drain)


async def replay(database: Database, text: str) -> int:
    """Everything from that time on is to be published again. Returns how many events wait for it."""
    return await database.write(partial(outbox.replay, since=since(text)))


async def release(database: Database, rules: Rules, feedback_id: str) -> None:
    """Lifts every quarantine from one piece of feedback, whoever gave it. Raises `errors.NotFound`."""
    await recorded(database, rules)
    await database.write(partial(_release, rules=rules, feedback_id=feedback_id))


def _release(connection: Connection, rules: Rules, feedback_id: str) -> None:
    here = feedback.c.feedback_id == feedback_id
    row = connection.execute(select(feedback.c.tenant, feedback.c.group_id).where(here)).one_or_none()
    if row is None:
        raise errors.NotFound(f"There is no feedback {feedback_id!r}.", remedy="See `thumbwheel feedback list`.")
    connection.execute(update(feedback).where(here).values(released=True))
    if row.group_id is not None:
        decide(connection, rules, row.tenant, [row.group_id])


async def declare_gold(database: Database, rules: Rules, feedback_id: str) -> None:
    """Makes the pair that this feedback judged a control question, and its judgement the known answer.

    It tells how far raters can be relied on, and is not learnt from any more. Raises `errors.NotFound` where there is
    no such comparison with a winner.
    """
    await recorded(database, rules)
    await database.write(partial(_declare_gold, rules=rules, feedback_id=feedback_id))


def _declare_gold(connection: Connection, rules: Rules, feedback_id: str) -> None:
    row = connection.execute(select(feedback).where(feedback.c.feedback_id == feedback_id)).one_or_none()
    if row is None or row.kind != "comparison" or row.choice not in ("a", "b"):
        raise errors.NotFound(
            f"There is no comparison {feedback_id!r} with a winner.", remedy="Give the id of one, of either order."
        )
    place = 0 if row.choice == "a" else 1
    chosen = connection.execute(
        select(feedback_generations.c.generation_id).where(
            feedback_generations.c.feedback_id == feedback_id, feedback_generations.c.place == place
        )
    ).scalar_one()
    here = (gold.c.tenant == row.tenant) & (gold.c.item == row.item)
    if not connection.execute(update(gold).where(here).values(chosen=chosen)).rowcount:
        values = {"tenant": row.tenant, "item": row.item, "chosen": chosen, "declared_at": outbox.now_micros()}
        connection.execute(insert(gold), values)
    if row.group_id is not None:
        decide(connection, rules, row.tenant, [row.group_id])
