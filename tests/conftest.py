"""Fixtures that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support import Process

# Tests have a time-out of their own. An example that takes long because the machine is busy is no failure.
settings.register_profile("thumbwheel", deadline=None)
settings.load_profile("thumbwheel")


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    """Processes put here are killed at the end of the module, whatever happened."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()
