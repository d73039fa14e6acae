"""Backup and restore: everything in the database as lines of JSON, compressed, the same for SQLite and PostgreSQL.

    {"format": "thumbwheel-collector", "schema": "0002", …}     what it is
    {"table": "feedback", "row": {…}}                           one line a row; bytes in base64
    {"rows": 123}                                               the end: without it, the file was cut off

A backup is one consistent view, taken while the collector works. It is written beside its place and then moved there.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from sqlalchemy import Connection, Table, func, insert, select, text

from services.collector.database import Database
from services.collector.tables import inbox, metadata
from thumbwheel import errors

FORMAT = "thumbwheel-collector"
_ROWS = 500
_TABLES = (inbox, *metadata.sorted_tables)
"""In this order: what is recorded while they are read is in both, and passed over once it is restored."""


def backup(database: Database, path: Path) -> int:
    """Writes everything into `path`. Returns the number of rows. Raises `errors.NoSpace` and `FailedPrecondition`."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as raw, gzip.open(raw, "wt", encoding="utf-8") as file:
            rows = 0
            for line in database.snapshot(_lines):
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                rows += "row" in line
            file.write(json.dumps({"rows": rows}) + "\n")
            file.close()
            raw.flush()
            os.fsync(raw.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise errors.NoSpace(
            f"The backup cannot be written to {path}: {error.strerror}.", remedy="Choose a place with space for it."
        ) from error
    return rows


async def restore(database: Database, path: Path) -> int:
    """Puts a backup into an empty database, all of it or nothing. Returns the number of rows.

    Raises `errors.FailedPrecondition` where the database is not empty, or the file no whole backup of this schema.
    """
    return await asyncio.to_thread(database.write_all_now, partial(_restore, path=path))


def _lines(connection: Connection) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "schema": _schema(connection), "created_at": datetime.now(UTC).isoformat()}
    for table in _TABLES:
        ordered = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_ROWS)
        for row in connection.execute(ordered).mappings():
            yield {"table": table.name, "row": {name: _packed(value) for name, value in row.items()}}


def _restore(connection: Connection, path: Path) -> int:
    for table in _TABLES:
        if connection.execute(select(func.count()).select_from(table)).scalar_one():
            raise errors.FailedPrecondition(
                f"The database is not empty: {table.name} has rows.", remedy="Restore into a new one, with --database."
            )
    tables = {table.name: table for table in _TABLES}
    rows, end = 0, None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            head = json.loads(file.readline())
            if head.get("format") != FORMAT or head.get("schema") != _schema(connection):
                raise errors.FailedPrecondition(
                    f"{path} is of schema {head.get('schema')!r}, the database of {_schema(connection)!r}.",
                    remedy="Restore with the version of Thumbwheel that wrote it, then upgrade.",
                )
            while lines := [json.loads(line) for line in islice(file, _ROWS)]:
                by_table: dict[str, list[dict[str, Any]]] = {}
                for line in lines:
                    if "rows" in line:
                        end = line["rows"]
                    else:
                        by_table.setdefault(line["table"], []).append(_unpacked(line["row"]))
                for name, values in by_table.items():
                    connection.execute(insert(tables[name]), values)
                    rows += len(values)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise errors.FailedPrecondition(f"{path} is no backup: {error}.", remedy="Take another one.") from error
    if end != rows:
        raise errors.FailedPrecondition(f"{path} is cut off after {rows} rows.", remedy="Take another one.")
    _number_on(connection)
    return rows


def _number_on(connection: Connection) -> None:
    """PostgreSQL numbers rows from a counter of its own, which the rows put in have not moved."""
    if connection.dialect.name != "postgresql":
        return
    for table in _TABLES:
        column = _numbered(table)
        if column is not None:
            connection.execute(
                text(
                    f"SELECT setval(pg_get_serial_sequence('{table.fullname}', '{column}'),"
                    f" coalesce((SELECT max({column}) FROM {table.fullname}), 0) + 1, false)"
                )
            )


def _numbered(table: Table) -> str | None:
    column = table.autoincrement_column
    return None if column is None else column.name


def _schema(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _packed(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes | memoryview) else value


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: base64.b64decode(value["base64"]) if isinstance(value, dict) else value for name, value in row.items()
    }
