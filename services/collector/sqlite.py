"""SQLite's part of the database: the record in one file, the inbox in another beside it, each with its own write lock.

A transaction says by `mode`, an execution option, what it writes. The inbox's file is attached to a connection when a
transaction first needs it, and not to that which writes the record, as BEGIN IMMEDIATE locks all that is attached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from services.collector.tables import DOOR

READS, WRITES_RECORD, WRITES_INBOX, WRITES_BOTH = "reads", "record", "inbox", "both"
"""What a transaction does; the default is to write the record. PostgreSQL needs not know."""
_MIGRATES = "schema"

BUSY_SECONDS = 5.0
_ATTACHED = "inbox attached"
# Names the inbox first. One that reads sees a row in the inbox, in the record or in both, and never in neither, as it
# is recorded before it is taken out. One that writes has the inbox's lock, and nobody takes anything out meanwhile.
_LOOK = f"SELECT 1 FROM {DOOR}.inbox LIMIT 1"
_LOCK = f"DELETE FROM {DOOR}.inbox WHERE seq < 0"


def inbox_path(record: Path) -> Path:
    """Where the inbox of a record is."""
    return record.with_name(f"{record.stem}-inbox{record.suffix}")


def listen(engine: Engine) -> None:
    """Sees to an engine's connections and transactions."""
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)


@contextlib.contextmanager
def whole(connection: Connection) -> Iterator[None]:
    """Transactions of the body may change the tables of both; PostgreSQL's always may."""
    if connection.dialect.name != "sqlite":
        yield
        return
    connection.execution_options(mode=_MIGRATES)
    attach(connection)
    try:
        yield
    finally:
        connection.execution_options(mode=WRITES_RECORD)
        _detach(connection)


def attach(connection: Connection) -> None:
    """Attaches the inbox, where it is not."""
    if connection.info.get(_ATTACHED):
        return
    record = connection.engine.url.database
    assert record is not None
    driver: Any = connection.connection.driver_connection
    driver.execute(f"ATTACH DATABASE ? AS {DOOR}", (str(inbox_path(Path(record))),)).close()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        driver.execute(f"PRAGMA {DOOR}.{pragma}").close()
    connection.info[_ATTACHED] = True


def _detach(connection: Connection) -> None:
    # By the driver: a connection that this is done on is in no transaction.
    driver: Any = connection.connection.driver_connection
    driver.execute(f"DETACH DATABASE {DOOR}").close()
    connection.info[_ATTACHED] = False


def checkpoint_inbox(driver: Any) -> None:
    """Copies as much of the inbox's log into its file as can be without making anybody wait."""
    driver.execute(f"PRAGMA {DOOR}.wal_checkpoint(PASSIVE)").close()


def leave_log(connection: Connection) -> None:
    """Commits of this connection leave the log to others to copy."""
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA wal_autocheckpoint=0").close()


def _configure(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver's own transactions break savepoints: `_begin` starts them
    for pragma in (
        f"busy_timeout={int(BUSY_SECONDS * 1000)}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",  # what is deleted is overwritten, not only let go of
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get("mode", WRITES_RECORD)
    if mode != WRITES_RECORD:
        attach(connection)
    elif connection.info.get(_ATTACHED):
        _detach(connection)
    # IMMEDIATE: a writer waits for its turn at the start, where waiting is possible, and not in the middle.
    connection.exec_driver_sql("BEGIN" if mode in (READS, WRITES_INBOX) else "BEGIN IMMEDIATE")
    if mode == WRITES_INBOX:
        connection.exec_driver_sql(_LOCK)
    elif mode == READS:
        connection.exec_driver_sql(_LOOK).close()
