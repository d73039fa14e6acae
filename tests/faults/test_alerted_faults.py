"""A short form of `make faults`: four of its faults, told by their alerts, and nothing lost of them."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults import alerted
from tests.faults.alerted import MOST_RETRIES
from tests.faults.proxy import FAULTS

CHOSEN = {"broker partition", "database reset", "collector kill -9", "clock"}


@pytest.mark.timeout(400)
def test_faults_are_told_of_and_pass(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes, verdict, retries = asyncio.run(alerted.run("postgres", 1, CHOSEN.__contains__, print))
    assert {outcome.name: outcome.alert for outcome in outcomes} == {
        "broker partition": "ThumbwheelBrokerAway",
        "database reset": "ThumbwheelDatabaseAway",
        "collector kill -9": "ThumbwheelPartDown",
        "clock": "ThumbwheelClockOff",
    }
    # How long each took is for `make faults` to tell: a machine may be busy while tests run.
    assert (verdict.lost, verdict.doubled, verdict.reordered, verdict.wrong) == ([], [], [], [])
    assert verdict.counts["acknowledged"] > 100
    assert retries <= MOST_RETRIES
    assert capsys.readouterr().out.count("after it healed") == len(CHOSEN)


def test_every_fault_of_the_network_is_between_all_parts() -> None:
    for database, links in {"sqlite": ("clients", "broker"), "postgres": ("clients", "broker", "database")}.items():
        names = {case.name for case in alerted.cases(database)}
        assert {f"{link} {fault}" for link in links for fault in FAULTS} <= names
