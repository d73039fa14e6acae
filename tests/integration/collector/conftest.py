"""The databases that the collector must keep the same promises on, each with the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uuid_utils

from services.collector.database import Database
from tests.postgres import Postgres
from tests.unit.services.collector.parts import Deployment


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests that do not mistreat it."""
    server = Postgres()
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'collector.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(str(uuid_utils.uuid4()))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment.at(tmp_path)
