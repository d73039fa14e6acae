"""A short form of `make faults-collector`: some kills, a full disk, commits that have to wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.collector import run_episode
from tests.faults.disk import IN_A_NAMESPACE, NO_SPACE, slow


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_killed_under_load(database: str) -> None:
    episode = await run_episode(database, seed=11, kills=5)
    assert episode.verdict.holds, episode.verdict
    assert episode.kills.total() == 5
    assert episode.verdict.counts["acknowledged"] == episode.verdict.counts["submissions"] > 20


def test_a_full_disk() -> None:
    run = subprocess.run(
        [*IN_A_NAMESPACE, sys.executable, "-m", "tests.faults.disk", "full"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert NO_SPACE in run.stdout
    assert "Free space on that disk" in run.stdout


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_commits_that_have_to_wait(database: str) -> None:
    verdict, load = await slow(database)
    assert verdict.holds, verdict
    assert verdict.counts["acknowledged"] == verdict.counts["submissions"] > 20
    assert load.refusals
