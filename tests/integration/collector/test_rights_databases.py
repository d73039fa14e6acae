"""Forget, retention, export and import keep their promises on PostgreSQL as on SQLite."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, select

from services.collector import tables
from services.collector.config import CollectorSettings
from services.collector.database import Database, migrate
from tests.postgres import Postgres
from tests.unit.services.collector import parts
from tests.unit.services.collector.exchange.test_exchange_files import (  # noqa: F401
    test_a_row_is_one_in_every_format_and_of_one_tenant,
    test_an_export_holds_what_stands,
    test_an_import_is_taken_back_by_forgetting_it,
)
from tests.unit.services.collector.parts import Deployment
from tests.unit.services.collector.rights.test_rights_forget import (  # noqa: F401
    arrive,
    asked_by,
    forget,
    found_in,
    test_again_says_the_same,
    test_exported_rows_go_too,
    test_many_are_erased_in_pages,
    test_what_was_forgotten_does_not_come_back,
)


@pytest.fixture
def settings(tmp_path: Path) -> CollectorSettings:
    return parts.settings(tmp_path)


async def test_postgresql_holds_nothing_but_in_its_log(
    postgres: Postgres, deployment: Deployment, settings: CollectorSettings
) -> None:
    url = postgres.create("forgets")
    database = Database(url)
    try:
        # Short: PostgreSQL compresses what is long, and a scan would not find it.
        mine, bobs = deployment.generation("mine-51c9"), deployment.generation("bobs-0aa1")
        mine.user_id, bobs.user_id = "ann", "bob"
        await arrive(database, mine, bobs)
        await deployment.submit(database, parts.edit(bobs, "edit-77aa"))
        await deployment.submit(database, parts.comment(bobs, "seen by bob", user="bob"))
        checkpoint(url)
        folder, words = postgres.folder / "data" / "base", ["mine-51c9", "edit-77aa", "bobs-0aa1"]
        assert {secret for _, secret in found_in(folder, words)} == set(words), "planted"
        response = await forget(database, settings, "ann")
        assert (response.feedback_erased, response.generations_erased) == (1, 1)
        checkpoint(url)
        assert {secret for _, secret in found_in(folder, words)} == {"bobs-0aa1"}
    finally:
        database.close()


async def test_users_and_consent_of_the_version_before_are_carried_over(url: str, deployment: Deployment) -> None:
    mine, nobodys = asked_by(deployment, "ann", "x"), deployment.generation("y")
    nobodys.consent = False
    database = Database(url)
    await arrive(database, mine, nobodys)
    database.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        migrate(connection, down_to="0002")
        migrate(connection)
        rows = connection.execute(select(tables.generations.c.user_id, tables.generations.c.consent)).all()
    engine.dispose()
    assert sorted(tuple(row) for row in rows) == [("", False), ("ann", True)]


def checkpoint(url: str) -> None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
