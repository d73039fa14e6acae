"""How much feedback came in a day, of each user and of each tenant: what the caps of curation count by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from services.collector import many
from services.collector.tables import tallies

_DAY_MICROS = 86_400 * 1_000_000
_EVERYBODY = ""


def _counted(insert: Any) -> Any:
    more = insert(tallies)
    return more.on_conflict_do_update(
        index_elements=[tallies.c.tenant, tallies.c.user_id, tallies.c.day],
        set_={"count": tallies.c.count + more.excluded.count},
    )


_COUNTED = {"sqlite": _counted(sqlite.insert), "postgresql": _counted(postgresql.insert)}
_COUNTS = "SELECT user_id, count FROM tallies WHERE tenant = :tenant AND day = :day AND user_id IN (:many)"


def count(connection: Connection, tenant: str, came: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Counts pieces of feedback of a tenant, each given by its user and when it came, in microseconds.

    Returns of each how many its user, and the whole tenant, had given before it on that UTC day.
    """
    more = Counter((micros // _DAY_MICROS, who) for user_id, micros in came for who in (user_id, _EVERYBODY))
    # In one order everywhere: two collectors that count the same users wait for each other, and not in a circle.
    rows = [{"tenant": tenant, "user_id": who, "day": day, "count": n} for (day, who), n in sorted(more.items())]
    connection.execute(_COUNTED[connection.dialect.name], rows)
    before: dict[tuple[int, str], int] = {}
    for day in {day for day, _ in more}:
        users = [who for on, who in more if on == day]
        for who, total in many.find(connection, _COUNTS, users, tenant=tenant, day=day):
            before[day, who] = total - more[day, who]
    ranks = []
    for user_id, micros in came:
        day = micros // _DAY_MICROS
        ranks.append((before[day, user_id], before[day, _EVERYBODY]))
        before[day, user_id] += 1
        before[day, _EVERYBODY] += 1
    return ranks
