"""Looks many values up at once, in SQL that is written once for each number of them.

SQLAlchemy writes a list of values into its statement anew with every call, which takes longer than the lookups do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, TextClause, text

PAGE = 512
"""Most values in one statement: databases take some thousands of parameters."""

_LEAST = 8


def find(connection: Connection, sql: str, values: Sequence[Any], **others: Any) -> list[Any]:
    """The rows of a query whose `IN (:many)` takes these values, or tuples of one width as `IN (VALUES :many)`.

    Neither duplicates nor their order matter; there may be any number of them, where the query does not order its rows.
    """
    rows: list[Any] = []
    for start in range(0, len(values), PAGE):
        page = values[start : start + PAGE]
        count = _LEAST
        while count < len(page):
            count *= 2
        width = len(page[0]) if isinstance(page[0], tuple) else 0
        padded = [*page, *[page[-1]] * (count - len(page))]
        flat = [each for one in padded for each in one] if width else padded
        names, statement = _statement(sql, count, width)
        rows += connection.execute(statement, {**dict(zip(names, flat, strict=True)), **others}).all()
    return rows


@lru_cache(maxsize=256)
def _statement(sql: str, count: int, width: int) -> tuple[list[str], TextClause]:
    names = [f"v{number}" for number in range(count * max(1, width))]
    marks = [f":{name}" for name in names]
    if width:
        marks = [f"({', '.join(marks[start : start + width])})" for start in range(0, len(marks), width)]
    return names, text(sql.replace(":many", ", ".join(marks)))
