"""The short form of `make faults-restarts`: each replica once, under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import restarts

pytestmark = pytest.mark.timeout(400)


async def test_a_rolling_restart_costs_no_call(tmp_path: Path) -> None:
    report = await restarts.run(tmp_path, restarts=2, users=4)
    assert (report.failed, report.unrecorded, report.statuses) == ([], 0, [0, 0])
    assert report.restarts == 2
    assert report.calls > 8
    assert report.bulk > 0
