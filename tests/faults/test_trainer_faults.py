"""A short form of `make faults-trainer`, and what its checker would say of trainers that are wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from tests.faults import trainer
from tests.faults.trainer_checker import Event, Version, violations


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer.begin(tmp_path_factory.mktemp("begun"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "live"), [(1, True), (1, False), (2, False)])
def test_killed_while_it_learns(ranks: int, live: bool, begun: Path) -> None:
    episode = trainer.run_episode(begun, seed=5, kills=3, ranks=ranks, live=live)
    assert episode.violations == []
    assert (episode.kills, episode.versions > 2, episode.learnt >= 12) == (3, True, True)


STREAM = [Event(offset, id, "accepted") for offset, id in enumerate("abcd")]


def version(number: int, samples: str, start: int, end: int, retracted: str = "") -> Version:
    digest = hashlib.sha256("".join(f"{id}\n" for id in sorted(samples)).encode()).hexdigest()
    parent = str(number - 1) if number else ""
    return Version(str(number), parent, list(samples), len(samples), digest, list(retracted), start, end, "weights")


BASE, FIRST, SECOND = version(0, "", 0, 0), version(1, "ab", 0, 2), version(2, "cd", 2, 4)


def test_the_checker_finds_nothing_where_all_is_well() -> None:
    assert list(violations(STREAM, [BASE, FIRST, SECOND])) == []
    taken_back = [*STREAM, Event(4, "a", "retracted"), Event(5, "e", "accepted"), Event(6, "e", "retracted")]
    assert list(violations(taken_back, [BASE, FIRST, SECOND, version(3, "", 4, 7, retracted="a")])) == []


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ([BASE, FIRST], "c was accepted and never learnt"),
        ([BASE, FIRST, version(2, "bcd", 2, 4)], "b was learnt 2 times"),
        ([BASE, FIRST, version(2, "cdx", 2, 4)], "x was learnt and is not on the stream"),
        ([BASE, FIRST, version(2, "cd", 3, 4)], "2 begins at offset 3, and the one before ended at 2"),
        ([BASE, FIRST, dataclasses.replace(SECOND, parent="0")], "1 versions are not on the way"),
        ([BASE, FIRST, dataclasses.replace(SECOND, samples=["c", "d", "d"])], "2: its ids are not those"),
        ([BASE, FIRST, dataclasses.replace(SECOND, sample_count=3)], "2: 2 ids, and the manifest says 3"),
        ([BASE, FIRST, version(2, "cd", 2, 4, retracted="a")], "a is listed as retracted, and the stream does not"),
    ],
)
def test_the_checker_finds_what_is_wrong(versions: list[Version], message: str) -> None:
    assert any(found.startswith(message) for found in violations(STREAM, versions))


def test_the_checker_wants_retractions_to_be_listed() -> None:
    taken_back = [*STREAM, Event(4, "a", "retracted")]
    found = list(violations(taken_back, [BASE, FIRST, SECOND]))
    assert found == ["a was learnt and retracted, and no later version says so"]
