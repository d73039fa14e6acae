"""SQLite and PostgreSQL: one path of code, one set of promises. The record's own tests run here on both servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Table, create_engine, inspect, select, text

from services.collector import dump, outbox, tables
from services.collector.database import Database, migrate
from tests.postgres import Postgres
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import A, Deployment, store
from tests.unit.services.collector.test_collector_decide import *  # noqa: F403
from tests.unit.services.collector.test_collector_ledger import *  # noqa: F403
from thumbwheel import errors
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import FeedbackState


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def differences(connection: Connection) -> object:
    return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), tables.metadata)


def test_migrations_go_up_and_down(connection: Connection) -> None:
    for _ in range(2):
        migrate(connection)
        assert differences(connection) == []
        connection.rollback()
        migrate(connection, down_to="base")
        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
        connection.rollback()


def test_the_disk_is_waited_for(database: Database) -> None:
    name = "PRAGMA synchronous" if database.dialect == "sqlite" else "SHOW synchronous_commit"
    assert database.read_now(lambda connection: connection.exec_driver_sql(name).scalar_one()) in (2, "on")


async def test_feedback_of_the_version_before_is_carried_over(
    url: str, connection: Connection, deployment: Deployment
) -> None:
    """Rows as version 0001 wrote them; after the migration they are curated, retracted and superseded as any."""
    migrate(connection)
    migrate(connection, down_to="0001")
    a, b = deployment.pair()
    vote, taken_back, late = (parts.comparison(a, b, A, user=user) for user in ("ann", "bob", "cyd"))
    written = [(vote, "ACCEPTED", ""), (taken_back, "RETRACTED", "retracted_by_user"), (late, "HELD", "")]
    ids, comparison_ids = [parts.new_id() for _ in written], [parts.new_id() for _ in written]
    with connection.begin():
        for event in (a, b):
            _insert_old(
                connection,
                "generations",
                {
                    "generation_id": event.event_id,
                    "tenant": "default",
                    "prompt_id": event.generation.prompt_id,
                    "event": event.SerializeToString(),
                    "stored_at": 1,
                },
            )
        for number, (feedback, state, reason) in enumerate(written):
            _insert_old(
                connection,
                "feedback",
                {
                    "feedback_id": ids[number],
                    "tenant": "default",
                    "idempotency_key": feedback.idempotency_key,
                    "body_sha256": bytes(32),
                    "user_id": feedback.user_id,
                    "kind": "comparison",
                    "body": feedback.SerializeToString(deterministic=True),
                    "prompt_id": a.generation.prompt_id,
                    "state": state,
                    "reason": reason,
                    "comparison_id": None if state == "HELD" else comparison_ids[number],
                    "received_at": 1_000_000 + number,
                },
            )
            for place, event in enumerate((a, b)):
                row = {"feedback_id": ids[number], "place": place, "generation_id": event.event_id}
                _insert_old(connection, "feedback_generations", row)
    database = Database(url)
    try:
        [record] = [one for one in await parts.find(database, *ids) if one.feedback_id == ids[0]]
        assert (record.state, record.weight) == (FeedbackState.FEEDBACK_STATE_ACCEPTED, 1.0)
        assert await parts.published(database) == [], "what was published before is not published again"
        await deployment.submit(database, parts.comparison(a, b, A, user="ann"))
        assert await parts.published(database) == [], "she says what she had said"
        await deployment.submit(database, parts.comparison(b, a, A, user="ann"))
        gone, come = await parts.published(database)
        assert (gone.comparison_id, gone.revision, gone.reason) == (comparison_ids[0], 2, "superseded")
        assert (come.chosen.generation_id, come.revision) == (b.event_id, 1)
    finally:
        database.close()


def _insert_old(connection: Connection, table: str, row: dict[str, object]) -> None:
    names = list(row)
    values = ", ".join(f":{name}" for name in names)
    connection.execute(text(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})"), row)


async def test_a_server_that_restarts_loses_nothing_acknowledged(deployment: Deployment) -> None:
    """kill -9 of PostgreSQL under writes: each was made or refused, and the collector goes on by itself."""
    server = Postgres().start()
    database = Database(server.create("restarts"))
    try:
        event = deployment.generation()
        await store(database, event)
        acked: list[str] = []
        refused = 0

        async def write(number: int) -> None:
            nonlocal refused
            try:
                recorded = await deployment.submit(database, parts.comment(event, f"{number}", key=f"{number}"))
                acked.append(recorded.record.feedback_id)
            except errors.Unavailable:
                refused += 1

        writes = [asyncio.create_task(write(number)) for number in range(400)]
        await asyncio.wait(writes[:20])
        await asyncio.to_thread(server.kill)
        await asyncio.gather(*writes)
        assert refused > 0
        await asyncio.to_thread(server.start)
        await parts.eventually(partial(_again, database, deployment, event), bool)
        found = await parts.find(database, *acked)
        assert [record.feedback_id for record in found] == acked
        levels = await database.read(outbox.levels)
        assert levels.unpublished >= len(acked)
    finally:
        database.close()
        server.remove()


@pytest.mark.parametrize("into", ["sqlite", "postgresql"])
async def test_a_backup_of_either_goes_into_either(
    database: Database, deployment: Deployment, postgres: Postgres, tmp_path: Path, into: str
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    await deployment.submit(database, parts.comparison(a, b))
    await deployment.submit(database, parts.thumb(a))
    path = tmp_path / "backup.jsonl.gz"
    rows = await asyncio.to_thread(dump.backup, database, path)
    target = f"sqlite:///{tmp_path / 'restored.db'}" if into == "sqlite" else postgres.create(parts.new_id())
    restored = Database(target)
    try:
        assert await dump.restore(restored, path) == rows > 10
        for table in tables.metadata.sorted_tables:
            wanted = partial(_rows, table=table)
            assert restored.read_now(wanted) == database.read_now(wanted), table.name
        await deployment.submit(restored, parts.comparison(b, a, A))
        assert [event.revision for event in await parts.published(restored)] == [1, 2, 1]
        with pytest.raises(errors.FailedPrecondition, match="not empty"):
            await dump.restore(restored, path)
    finally:
        await asyncio.to_thread(restored.close)


def _rows(connection: Connection, table: Table) -> list[tuple[object, ...]]:
    return [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns))]


async def _again(database: Database, deployment: Deployment, event: GenerationEvent) -> bool:
    try:
        await deployment.submit(database, parts.comment(event, "after", key="after"))
    except errors.Unavailable:
        return False
    return True
