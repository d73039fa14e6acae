"""How much feedback came in a day, of each user and of each tenant: what the caps of curation count by."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from services.collector.tables import tallies

_DAY_MICROS = 86_400 * 1_000_000


def _counted(insert: Any) -> Any:
    return (
        insert(tallies)
        .on_conflict_do_update(
            index_elements=[tallies.c.tenant, tallies.c.user_id, tallies.c.day], set_={"count": tallies.c.count + 1}
        )
        .returning(tallies.c.count)
    )


_COUNTED = {"sqlite": _counted(sqlite.insert), "postgresql": _counted(postgresql.insert)}


def count(connection: Connection, tenant: str, user_id: str, micros: int) -> tuple[int, int]:
    """Counts a piece of feedback. Returns how many the user, and the tenant, had given before it on that UTC day."""
    day = micros // _DAY_MICROS
    counted = _COUNTED[connection.dialect.name]
    user, everybody = (
        connection.execute(counted, {"tenant": tenant, "user_id": of, "day": day, "count": 1}).scalar_one() - 1
        for of in (user_id, "")
    )
    return user, everybody
