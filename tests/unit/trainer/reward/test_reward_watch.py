"""The reward model, judged on comparisons before it learns them; and the sign of over-optimisation."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from tests.unit.trainer.samples import make_sample
from thumbwheel.heads import ONE_HEAD
from trainer import metrics
from trainer.judge import Judged
from trainer.reward.watch import LEAST, MOST, RewardWatch, Seen


def seen(chosen: tuple[str, float], rejected: tuple[str, float]) -> Seen:
    return Seen(chosen[1], rejected[1], 0, (chosen[0], rejected[0]))


def duels(count: int, newer_wins: float, gain: float) -> list[Seen]:
    """Comparisons of two policy versions, of which the newer gets scores that are higher by so much."""
    rng = random.Random(0)
    found = []
    for index in range(count):
        new, old = ("policy-000004", rng.gauss(gain, 1)), ("policy-000001", rng.gauss(0, 1))
        found.append(seen(new, old) if index < newer_wins * count else seen(old, new))
    return found


@pytest.mark.parametrize(
    ("newer_wins", "gain", "alarmed"),
    [(0.4, 2.0, True), (0.5, 2.0, True), (0.8, 2.0, False), (0.4, 0.0, False)],
)
def test_scores_that_rise_while_people_do_not_prefer_it_are_an_alarm(
    newer_wins: float, gain: float, alarmed: bool
) -> None:
    watch = RewardWatch(duels(100, newer_wins, gain))
    assert bool(watch.over_optimised()) == alarmed
    metrics.watch(watch)
    assert REGISTRY.get_sample_value("thumbwheel_reward_over_optimised") == float(alarmed)
    assert REGISTRY.get_sample_value("thumbwheel_reward_newer_preferred_ratio") == newer_wins
    mean = REGISTRY.get_sample_value("thumbwheel_reward_policy_score_mean", {"version": "policy-000004"})
    assert mean == pytest.approx(gain, abs=0.35)


def test_a_version_that_wrote_nothing_of_late_is_shown_no_more() -> None:
    metrics.watch(RewardWatch([seen(("policy-000009", 1.0), ("policy-000008", 0.0))]))
    metrics.watch(RewardWatch([seen(("policy-000009", 1.0), ("policy-000009", 0.0))]))
    assert REGISTRY.get_sample_value("thumbwheel_reward_policy_score_mean", {"version": "policy-000008"}) is None
    assert REGISTRY.get_sample_value("thumbwheel_reward_policy_score_mean", {"version": "policy-000009"}) == 0.5


def test_too_few_comparisons_are_no_alarm() -> None:
    assert RewardWatch(duels(LEAST - 1, 0.0, 9.0)).over_optimised() == ""
    assert RewardWatch(duels(LEAST - 1, 0.0, 9.0)).summary() == {}


def test_rounds_are_taken_in_and_the_newest_are_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    watch = RewardWatch()
    for number in range(MOST // 50 + 2):
        pairs = tuple(make_sample(rng, chosen=rng.randint(1, 9), rejected=5) for _ in range(50))
        scores = np.stack([np.full(50, 1.0 + number), np.zeros(50)], axis=1)[:, :, None]
        watch.see(Judged(pairs, ONE_HEAD, scores))
    watch.save(tmp_path)
    again = RewardWatch.load(tmp_path)
    assert again.summary() == watch.summary()
    found = again.summary()
    assert found["fresh_pairs"] == MOST
    assert found["fresh_accuracy"] == 1.0
    assert RewardWatch.load(None).summary() == {}
