"""Looks many values up at once, in SQL that is written once for each number of them.

SQLAlchemy writes a list of values into its statement anew with every call, and looks every statement up among those
that it has written, which takes longer than the lookups do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, CursorResult, Dialect, text
from sqlalchemy.sql.compiler import SQLCompiler

PAGE = 512
"""Most values in one statement: databases take some thousands of parameters."""

_MANY = "many"


def find(connection: Connection, sql: str, values: Sequence[Any], **others: Any) -> list[Any]:
    """The rows of a query whose `IN (:many)` takes these values, or tuples of one width as `IN (VALUES :many)`.

    Neither duplicates nor their order matter; there may be any number of them, where the query does not order its rows.
    """
    rows: list[Any] = []
    for start in range(0, len(values), PAGE):
        rows += _execute(connection, sql, {_MANY: values[start : start + PAGE]}, others).all()
    return rows


def find_all(connection: Connection, sql: str, lists: Mapping[str, Sequence[Any]], **others: Any) -> Sequence[Any]:
    """The rows of a query that looks up several lists, by name; none of them empty, or longer than `PAGE`."""
    return _execute(connection, sql, lists, others).all()


def run(connection: Connection, sql: str, values: Sequence[Any], **others: Any) -> None:
    """Does as `find` for a statement that brings no rows."""
    for start in range(0, len(values), PAGE):
        _execute(connection, sql, {_MANY: values[start : start + PAGE]}, others).close()


def _execute(
    connection: Connection, sql: str, lists: Mapping[str, Sequence[Any]], others: Mapping[str, Any]
) -> CursorResult[Any]:
    given = dict(others)
    shapes = []
    for name, values in lists.items():
        count = 1 << (len(values) - 1).bit_length()
        width = len(values[0]) if isinstance(values[0], tuple) else 0
        padded = [*values, *[values[-1]] * (count - len(values))]
        flat = [each for one in padded for each in one] if width else padded
        shape = _Shape(name, count, width)
        shapes.append(shape)
        given.update(zip(_names(shape), flat, strict=True))
    statement = _statement(sql, tuple(shapes), connection.dialect)
    if statement.positions is None:
        return connection.exec_driver_sql(statement.sql, given)
    return connection.exec_driver_sql(statement.sql, tuple([given[name] for name in statement.positions]))


class _Shape(NamedTuple):
    """A list in a statement: so many values, or tuples of this width where it is not 0."""

    name: str
    size: int
    width: int


class _Statement(NamedTuple):
    """SQL as the driver takes it."""

    sql: str
    positions: Sequence[str] | None
    """Names of all parameters in their order; None where the driver takes them by name."""


@lru_cache(maxsize=256)
def _names(shape: _Shape) -> list[str]:
    return [f"{shape.name}{number}" for number in range(shape.size * max(1, shape.width))]


@lru_cache(maxsize=256)
def _statement(sql: str, shapes: tuple[_Shape, ...], dialect: Dialect) -> _Statement:
    for shape in shapes:
        marks = [f":{name}" for name in _names(shape)]
        if width := shape.width:
            marks = [f"({', '.join(marks[start : start + width])})" for start in range(0, len(marks), width)]
        sql = sql.replace(f":{shape.name}", ", ".join(marks))
    compiled = text(sql).compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    return _Statement(str(compiled), compiled.positiontup if compiled.positional else None)
