"""Fixtures that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Process


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    """Processes put here are killed at the end of the module, whatever happened."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()
