"""Writes are durable when they return, fail alone, and leave nothing half-done on a full disk."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Select, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from services.collector import outbox, tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import Thumb


def put(connection: Connection, id: str) -> str:
    outbox.add(connection, [outbox.Event(id, "t", id, Thumb())])
    return id


def ids(connection: Connection) -> list[str]:
    return [row.event_id for row in outbox.waiting(connection, 10_000)]


async def test_what_was_written_is_in_the_file_at_once(database: Database, settings: CollectorSettings) -> None:
    assert await database.write(lambda c: put(c, "a")) == "a"
    with sqlite3.connect(settings.home / "collector.db") as other:
        assert other.execute("select event_id from outbox").fetchall() == [("a",)]
    other.close()


async def test_the_disk_is_waited_for(database: Database) -> None:
    def pragma(connection: Connection, name: str) -> object:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    for name, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 5000)):
        assert await database.write(partial(pragma, name=name)) == value


@pytest.mark.parametrize("one_fails", [False, True])
async def test_waiting_writes_share_a_commit_and_fail_alone(database: Database, one_fails: bool) -> None:
    begun, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        assert release.wait(10)

    def fail(connection: Connection) -> None:
        put(connection, "undone")
        raise errors.Conflict("no")

    transactions: list[object] = []

    def write(connection: Connection, id: str) -> None:
        transactions.append(connection.get_transaction())
        put(connection, id)

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    writes = [asyncio.create_task(database.write(partial(write, id=str(i)))) for i in range(20)]
    failing = [asyncio.create_task(database.write(fail))] if one_fails else []
    await asyncio.sleep(0)  # the tasks queue their writes
    release.set()
    await first
    for task in failing:
        with pytest.raises(errors.Conflict):
            await task
    await asyncio.gather(*writes)
    assert len(transactions) == (40 if one_fails else 20), "run again where one fails, and only there"
    assert all(transaction is transactions[-1] for transaction in transactions[-20:]), "one commit for all"
    assert await database.read(ids) == [str(i) for i in range(20)]


async def test_too_many_waiting_writes_are_refused(settings: CollectorSettings) -> None:
    database = Database(settings.database_url, max_pending=2)
    begun, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        assert release.wait(10)

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    waiting = [asyncio.create_task(database.write(partial(put, id=str(i)))) for i in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(errors.ResourceExhausted) as raised:
        await database.write(lambda c: put(c, "refused"))
    assert raised.value.retry_after > 0
    release.set()
    await asyncio.gather(first, *waiting)
    assert await database.read(ids) == ["0", "1"]
    database.close()


async def test_a_write_has_a_deadline(settings: CollectorSettings) -> None:
    database = Database(settings.database_url, timeout=0.1)
    begun, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        assert release.wait(10)

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    with pytest.raises(errors.DeadlineExceeded):
        await database.write(lambda c: put(c, "given up"))
    with pytest.raises(errors.DeadlineExceeded):
        await first
    release.set()
    assert await database.write(lambda c: put(c, "next")) == "next"
    assert await database.read(ids) == ["next"], "a write given up before its turn is not made"
    database.close()


async def test_a_key_taken_meanwhile_is_seen_the_second_time(database: Database) -> None:
    runs = []

    def write(connection: Connection) -> str:
        runs.append(1)
        if len(runs) == 1:
            raise IntegrityError("insert", None, sqlite3.IntegrityError("UNIQUE constraint failed"))
        return put(connection, "a")

    assert await database.write(write) == "a"
    assert await database.read(ids) == ["a"]


async def test_maintenance_runs_alone_and_in_no_transaction(database: Database) -> None:
    def look(connection: sqlite3.Connection) -> tuple[bool, int]:
        connection.execute("VACUUM").close()
        return connection.in_transaction, connection.execute("select count(*) from outbox").fetchone()[0]

    before = [asyncio.create_task(database.write(partial(put, id=str(i)))) for i in range(3)]
    looking = asyncio.create_task(database.maintain(look))
    after = asyncio.create_task(database.write(lambda c: put(c, "after")))
    assert await looking == (False, 3)
    assert await asyncio.gather(*before, after) == ["0", "1", "2", "after"]
    with pytest.raises(errors.Unavailable, match="no such table"):
        await database.maintain(lambda connection: connection.execute("select * from absent"))
    with pytest.raises(ZeroDivisionError):
        await database.maintain(lambda _: 1 / 0)
    assert await database.write(lambda c: put(c, "later")) == "later"


async def test_an_error_of_the_database_quotes_nothing_of_what_people_said(database: Database) -> None:
    def fail(connection: Connection) -> None:
        connection.execute(text("insert into outbox (absent) values (:said)"), {"said": "a secret"})

    with pytest.raises(errors.Unavailable) as raised:
        await database.write(fail)
    assert "a secret" not in f"{raised.value} {raised.value.__cause__}"


async def test_a_full_disk_is_said_and_survived(database: Database) -> None:
    await database.write(lambda c: put(c, "before"))
    pages = await database.write(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())
    await database.write(lambda c: c.exec_driver_sql(f"PRAGMA max_page_count={pages}").close())

    def large(connection: Connection) -> None:
        put(connection, "half")
        outbox.add(connection, [outbox.Event("x" * 60, "t", "k" * 200_000, Thumb())])

    writes = [asyncio.create_task(database.write(large)) for _ in range(3)]
    for outcome in await asyncio.gather(*writes, return_exceptions=True):
        assert isinstance(outcome, errors.NoSpace)
        assert "full" in outcome.message
        assert "Free space" in outcome.remedy
    assert await database.read(ids) == ["before"], "nothing half-done"
    await database.write(lambda c: c.exec_driver_sql("PRAGMA max_page_count=1000000").close())
    await database.write(large)
    assert await database.read(ids) == ["before", "half", "x" * 60]


async def test_reading_does_not_wait_for_a_writer(database: Database) -> None:
    begun, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        put(connection, "uncommitted")
        begun.set()
        assert release.wait(10)

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    assert await database.read(ids) == []
    release.set()
    await first


def test_closing_makes_durable_what_waits(settings: CollectorSettings) -> None:
    async def write() -> None:
        database = Database(settings.database_url)
        writes = [asyncio.create_task(database.write(partial(put, id=str(i)))) for i in range(300)]
        await asyncio.sleep(0)
        await asyncio.to_thread(database.close)
        await asyncio.gather(*writes)
        with pytest.raises(errors.Unavailable):
            await database.write(lambda c: put(c, "late"))

    asyncio.run(write())
    again = Database(settings.database_url)
    count = asyncio.run(again.read(lambda c: c.execute(select(func.count()).select_from(tables.outbox)).scalar_one()))
    assert count == 300
    again.close()


def test_migrations_build_the_tables(database: Database) -> None:
    def differences(connection: Connection) -> object:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, tables.metadata)

    assert database.read_now(differences) == []


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (select(func.count()).select_from(tables.feedback).where(tables.held), "ix_feedback_held"),
        (select(tables.outbox.c.id).where(tables.unpublished).order_by(tables.outbox.c.id), "ix_outbox_unpublished"),
    ],
    ids=["held", "unpublished"],
)
def test_what_waits_is_found_without_reading_what_does_not(database: Database, query: Select[Any], index: str) -> None:
    sql = str(query.compile(dialect=sqlite.dialect()))
    plan = database.read_now(lambda c: c.exec_driver_sql(f"explain query plan {sql}").all())
    assert any(index in row.detail for row in plan), plan


def test_the_tables_are_postgresql_too() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's is not typed
    for table in tables.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))


def test_a_newer_schema_is_refused(settings: CollectorSettings) -> None:
    Database(settings.database_url).close()
    with sqlite3.connect(settings.home / "collector.db") as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()
    with pytest.raises(errors.FailedPrecondition, match=r"9999.*Run the version"):
        Database(settings.database_url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "keeps nothing"),
        ("not a url", "--database"),
        ("nosuch+driver://host/name", "--database"),
        ("sqlite:////proc/no/collector.db", "cannot open its database /proc/no/collector.db"),
    ],
)
def test_a_database_that_cannot_be_is_refused(url: str, message: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match=message) as raised:
        Database(url)
    assert raised.value.remedy


def test_a_damaged_file_is_refused(settings: CollectorSettings) -> None:
    Path(settings.home, "collector.db").write_bytes(b"no database at all " * 500)
    with pytest.raises(errors.FailedPrecondition, match=r"is damaged.*backup"):
        Database(settings.database_url)
