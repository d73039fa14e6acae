"""The inbox: where it lies, what writing to it waits for, and what that costs."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy

from services.collector import acknowledge as acknowledging
from services.collector.acknowledge import Incoming
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.sqlite import inbox_path
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import A, Deployment
from thumbwheel.v1.preference_pb2 import AspectPreference


def test_the_inbox_is_beside_the_record(settings: CollectorSettings, database: Database) -> None:
    assert inbox_path(Path("/x/collector.db")) == Path("/x/collector-inbox.db")
    assert inbox_path(settings.home / "collector.db").is_file()


def test_the_disk_is_waited_for(database: Database) -> None:
    with database.door() as connection:
        for name, value in (("synchronous", 2), ("journal_mode", "wal"), ("secure_delete", 1)):
            assert connection.exec_driver_sql(f"PRAGMA door.{name}").scalar_one() == value


def test_many_cost_as_many_statements_as_few(database: Database, deployment: Deployment) -> None:
    statements: list[str] = []

    def note(*called: object) -> None:
        statements.append(str(called[2]))

    def counted(number: int) -> int:
        checker = Checker(deployment.key, 1_000)
        pieces = [parts.comparison(*deployment.pair(), user=f"user-{i}") for i in range(number)]
        for piece in pieces:
            piece.comparison.aspects.append(AspectPreference(aspect="fluency", preference=A))
        incoming = [Incoming(checker.check(one, tenant="default")) for one in pieces]
        statements.clear()
        database.write_inbox_now(lambda connection: acknowledging.acknowledge(connection, incoming))
        return len(statements)

    sqlalchemy.event.listen(database._engine, "before_cursor_execute", note)
    counted(1)  # attaches
    assert 1 <= counted(2) == counted(96) <= 5
