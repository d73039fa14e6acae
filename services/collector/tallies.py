"""How much feedback came in a day, of each user and of each tenant: what the caps of curation count by."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from services.collector.tables import tallies

_DAY_MICROS = 86_400 * 1_000_000
_INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def count(connection: Connection, tenant: str, user_id: str, micros: int) -> tuple[int, int]:
    """Counts a piece of feedback. Returns how many the user, and the tenant, had given before it on that UTC day."""
    day = micros // _DAY_MICROS
    statement: Any = _INSERTS[connection.dialect.name](tallies)
    counted = statement.on_conflict_do_update(
        index_elements=[tallies.c.tenant, tallies.c.user_id, tallies.c.day], set_={"count": tallies.c.count + 1}
    ).returning(tallies.c.user_id, tallies.c.count)
    rows = connection.execute(
        counted.values([{"tenant": tenant, "user_id": of, "day": day, "count": 1} for of in (user_id, "")])
    )
    counts = {of: number - 1 for of, number in rows}
    return counts[user_id], counts[""]
