"""Thumbs weighted by how seldom responses like theirs are voted on."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.samples import make_samples
from thumbwheel import errors
from trainer.samples import Thumb
from trainer.voting import GREATEST_WEIGHT, VOTING, Voting

LENGTHS = st.lists(st.tuples(st.integers(1, 2000), st.booleans()), max_size=300)


def counted(shows: list[tuple[int, bool]]) -> Voting:
    """Of responses, each with its tokens and whether it was voted on."""
    voting = Voting()
    for tokens, voted in shows:
        voting.show(tokens)
        if voted:
            voting.vote(tokens)
    return voting


@given(shows=LENGTHS, tokens=st.integers(1, 10_000))
def test_weights_are_bounded_and_do_not_depend_on_the_order(shows: list[tuple[int, bool]], tokens: int) -> None:
    voting = counted(shows)
    assert 1 / GREATEST_WEIGHT <= voting.weight(tokens) <= GREATEST_WEIGHT
    assert counted(shows[::-1]).weight(tokens) == voting.weight(tokens)


@pytest.mark.parametrize("votes", [0, 7])
def test_where_nothing_is_known_of_what_was_shown_or_voted_on_every_thumb_counts_alike(votes: int) -> None:
    voting = Voting()
    for _ in range(votes):
        voting.vote(10)
    assert (voting.weight(10), voting.weight(1000)) == (1.0, 1.0)
    assert counted([(10, False)] * 1000).weight(10) == 1.0


def test_a_weight_by_hand() -> None:
    voting = counted([(20, True)] * 150 + [(20, False)] * 150 + [(200, True)] * 50 + [(200, False)] * 650)
    overall = 200 / 1000
    assert voting.weight(20) == pytest.approx(overall / ((150 + 50 * overall) / 350)), "0.4375"
    assert voting.weight(255) == pytest.approx(overall / ((50 + 50 * overall) / 750)), "128 to 255 are alike: 2.5"
    assert voting.weight(3) == 1.0, "none of these was ever shown"


def test_what_people_like_is_estimated_without_the_bias_of_who_votes() -> None:
    """Of short answers 30 % please and 40 % are voted on; of long ones 80 % please and 8 % are voted on."""
    draw, voting, thumbs = random.Random(3), Voting(), []
    for _ in range(20_000):
        tokens, pleases, votes = draw.choice([(30, 0.3, 0.4), (300, 0.8, 0.08)])
        voting.show(tokens)
        if draw.random() < votes:
            voting.vote(tokens)
            thumbs.append((tokens, draw.random() < pleases))
    naive = sum(liked for _, liked in thumbs) / len(thumbs)
    weights = [voting.weight(tokens) for tokens, _ in thumbs]
    weighted = sum(w for w, (_, liked) in zip(weights, thumbs, strict=True) if liked) / sum(weights)
    assert naive == pytest.approx(0.383, abs=0.02)
    assert weighted == pytest.approx(0.55, abs=0.02)
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=0.02), "the learning rate means what it meant"


def test_only_thumbs_are_weighted_and_what_they_weighed_counts() -> None:
    voting = counted([(2, True)] * 400 + [(200, False)] * 400 + [(200, True)] * 40)
    short = Thumb(id="a", prompt=(1,), response=(5, 6), liked=True, weight=0.5)
    long = dataclasses.replace(short, id="b", response=tuple(range(200)), weight=2.0)
    (pair,) = make_samples(1)
    weighted = voting.weighted([short, pair, long])
    assert [sample.weight for sample in weighted] == [0.5 * voting.weight(2), pair.weight, 2.0 * voting.weight(200)]
    assert voting.weight(2) < 1 < voting.weight(200)
    assert [dataclasses.replace(sample, weight=1.0) for sample in weighted] == [
        dataclasses.replace(sample, weight=1.0) for sample in (short, pair, long)
    ]


def test_it_survives_in_a_checkpoint_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    voting = counted([(20, True), (20, False), (300, False)])
    voting.save(tmp_path)
    assert Voting.load(tmp_path) == voting
    (tmp_path / VOTING).unlink()
    assert Voting.load(tmp_path) == Voting(), "an older checkpoint has none"
    for damaged in ("{", "[]", json.dumps({"shown": {"x": 1}, "voted": {}})):
        (tmp_path / VOTING).write_text(damaged)
        with pytest.raises(errors.CorruptCheckpoint, match=r"voting\.json"):
            Voting.load(tmp_path)
