"""A database in a temporary folder, and a log in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.collector.config import CollectorSettings
from services.collector.database import Database
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from tests.unit.services.collector.served import client, hands_off
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog

__all__ = ["client", "hands_off"]


@pytest.fixture
def settings(tmp_path: Path) -> CollectorSettings:
    return parts.settings(tmp_path)


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment.at(tmp_path)


@pytest.fixture
def database(settings: CollectorSettings) -> Iterator[Database]:
    database = Database(settings.database_url)
    yield database
    database.close()


@pytest.fixture
def log() -> Iterator[MemoryLog]:
    log = MemoryLog()
    log.ensure_topics(topics.topics(partitions=2, replication=1), 1.0)
    yield log
    log.close()
