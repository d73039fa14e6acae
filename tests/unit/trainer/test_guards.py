"""Each guard on its own: what it lets through, and what it says of what it does not."""

from __future__ import annotations

import dataclasses

import pytest

from tests.unit.trainer.samples import make_demonstrations, make_groups, make_samples
from trainer import guards
from trainer.config import TrainerSettings

FIRST = {"kl": 0.1, "entropy": 2.0, "repetition": 0.1, "response_tokens": 40.0, "diversity": 0.8, "reward": 1.0}


def test_repetition_is_the_share_of_4_grams_that_came_before() -> None:
    assert guards.repetition((1, 2, 3, 4)) == 0.0
    assert guards.repetition((1, 2, 3, 4, 5, 6, 7)) == 0.0
    assert guards.repetition((5,) * 13) == pytest.approx(9 / 10)
    assert guards.repetition((1, 2, 3, 4) * 2) == pytest.approx(1 / 5)


def test_diversity_is_that_of_all_responses_together() -> None:
    assert guards.diversity([(1, 2, 3), (4, 5, 6)]) == 1.0
    assert guards.diversity([(1, 2, 3), (1, 2, 3)]) == 0.5
    assert guards.diversity([(1,)]) == 1.0
    assert guards.diversity([tuple(range(32)) + (0, 1) * 50]) == 1.0, "what comes late does not count"


def test_vitals_are_those_of_what_the_policy_wrote() -> None:
    groups = [dataclasses.replace(group, versions=("policy-000001",)) for group in make_groups(3)]
    found = guards.vitals(
        [*groups, *make_demonstrations(9)], {"ppo_kl": 2.0, "kto_kl": 3.0, "entropy": 1.5, "loss": 9.0}
    )
    written = [response for group in groups for response in group.responses]
    assert found["response_tokens"] == sum(map(len, written)) / 12
    assert found["diversity"] == guards.diversity(written)
    assert (found["kl"], found["entropy"]) == (3.0, 1.5)
    assert found["reward"] == pytest.approx(sum(r.reward for g in groups for r in g.rollouts) / 12)
    assert guards.vitals(make_samples(20), {}) == {}, "people wrote these"


def test_what_is_as_at_first_passes_and_so_does_the_first_round() -> None:
    guards.check(FIRST, FIRST, TrainerSettings())
    guards.check(FIRST, {}, TrainerSettings())
    guards.check({}, FIRST, TrainerSettings())


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"kl": 101.0}, "kl", r"KL to the reference, in nats a response is 101, more than 100: .* set --max-kl"),
        ({"repetition": 0.6}, "repetition", r"repeated 4-grams is 0.6, more than 0.5: .* --max-repetition"),
        (
            {"response_tokens": 161.0},
            "length",
            r"have 161 tokens, 4.0 times as many as at first: .* --max-length-growth",
        ),
        ({"entropy": 0.19}, "entropy", r"entropy is 0.19 nats a token, 10% of what it was .* --min-entropy-share"),
        (
            {"diversity": 0.3, "reward": 1.5},
            "feedback_loop",
            r"37% of the distinct bigrams .* from 1 to 1.5: a feedback",
        ),
    ],
)
def test_what_is_out_of_bounds_is_named(change: dict[str, float], reason: str, message: str) -> None:
    with pytest.raises(guards.Unfit, match=message) as caught:
        guards.check(FIRST | change, FIRST, TrainerSettings())
    assert caught.value.reason == reason
    assert reason in guards.REASONS


def test_less_diverse_answers_alone_are_no_feedback_loop() -> None:
    guards.check(FIRST | {"diversity": 0.3}, FIRST, TrainerSettings())
    guards.check(FIRST | {"diversity": 0.3, "reward": 0.5}, FIRST, TrainerSettings())


def test_a_bound_of_0_is_none() -> None:
    settings = TrainerSettings(
        max_kl=0, max_repetition=0, max_length_growth=0, min_entropy_share=0, min_diversity_share=0
    )
    worst = {"kl": 1e6, "entropy": 1e-6, "repetition": 1.0, "response_tokens": 1e6, "diversity": 1e-6, "reward": 9.0}
    guards.check(worst, FIRST, settings)
