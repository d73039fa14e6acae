"""GRPO and RLOO equal TRL's: advantages, losses and gradients, with KL and with correction for staleness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trainer.losses import trl_peer
from tests.unit.trainer.samples import make_groups
from trainer.losses import grpo
from trainer.losses.base import Prepared, Round
from trainer.losses.grpo import Grpo
from trainer.samples import Sample

CLIP = 0.2
rewards = st.lists(st.integers(-80, 80).map(lambda number: number / 8), min_size=2, max_size=8)


def make(name: str, *, kl_weight: float = 0.0, missing_eos_penalty: float = 0.0) -> Grpo:
    return Grpo(name, kl_weight, CLIP, 0.5, 5.0, missing_eos_penalty)


def prepare(
    objective: Grpo, groups: Sequence[Sample], old: dict[str, Tensor], reference: dict[str, Tensor], *, steps: int = 2
) -> Prepared:
    def evaluate(function: Callable[..., Any], wanted: Sequence[Sample]) -> dict[str, Tensor]:
        return {sample.id: old[sample.id].detach() for sample in wanted}

    return objective.prepare(Round(groups, reference, steps, evaluate, {}))


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize(("name", "recorded"), [("grpo", False), ("grpo", True), ("rloo", False)])
def test_they_equal_trl_on_the_same_logprobs(
    name: str, recorded: bool, kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(3, recorded=recorded)
    old, reference = (trl_peer.random_logprobs(groups, seed) for seed in (1, 2))
    generator = torch.Generator().manual_seed(3)
    # Near enough to the old ones that some ratios are clipped and some are not.
    policy = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in old.items()}
    inputs = trl_peer.leaves(policy)
    advantages, theirs = trl_peer.policy_gradient_loss(
        name,
        groups,
        policy,
        old,
        reference,
        kl_weight=kl_weight,
        clip_range=CLIP,
        importance=(0.5, 5.0) if recorded else None,
        monkeypatch=monkeypatch,
    )
    objective = make(name, kl_weight=kl_weight)
    prepared = prepare(objective, groups, old, reference)
    found = torch.cat([prepared.given["advantages"][group.id] for group in groups])
    lengths = torch.tensor([len(response) for group in groups for response in group.responses])
    torch.testing.assert_close(found, advantages.repeat_interleave(lengths), rtol=1e-5, atol=1e-5)
    ours = trl_peer.our_losses(
        objective, groups, policy, {**prepared.given, "reference": reference}, prepared.constants, monkeypatch
    )
    trl_peer.assert_same(ours.losses.mean(), theirs, inputs)
    assert 0 < ours.measures["clip_fraction"].mean() < 1
    assert ("importance_weight" in ours.measures) == recorded


def test_in_a_round_of_one_step_the_old_policy_is_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = make_groups(3)
    policy = trl_peer.random_logprobs(groups, 1)
    inputs = trl_peer.leaves(policy)
    gradients = []
    for steps in (1, 2):
        prepared = prepare(make("grpo"), groups, policy, {}, steps=steps)
        assert ("old" in prepared.given) == (steps > 1)
        ours = trl_peer.our_losses(make("grpo"), groups, policy, prepared.given, prepared.constants, monkeypatch)
        gradients.append(torch.autograd.grad(ours.losses.mean(), inputs))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@given(values=rewards)
def test_advantages_are_relative_to_the_group(values: list[float]) -> None:
    scores = torch.tensor(values)
    for advantages in (grpo.group_advantages(scores), grpo.leave_one_out_advantages(scores)):
        assert advantages.sum().item() == pytest.approx(0.0, abs=1e-3)
    for index, value in enumerate(values):
        others = values[:index] + values[index + 1 :]
        expected = value - sum(others) / len(others)
        assert grpo.leave_one_out_advantages(scores)[index].item() == pytest.approx(expected, abs=1e-4)
    shifted = grpo.group_advantages(scores + 100.0)
    torch.testing.assert_close(shifted, grpo.group_advantages(scores), rtol=0, atol=1e-2)


def test_a_group_of_one_or_of_equals_teaches_nothing() -> None:
    for function in (grpo.group_advantages, grpo.leave_one_out_advantages):
        assert function(torch.tensor([3.0])).tolist() == [0.0]
        assert function(torch.tensor([3.0, 3.0, 3.0])).tolist() == [0.0, 0.0, 0.0]


def test_a_response_that_was_cut_pays_for_it() -> None:
    (group,) = make_groups(1)
    cut = dataclasses.replace(group.rollouts[0], finished=False)
    group = dataclasses.replace(group, rollouts=(cut, *group.rollouts[1:]))
    lengths = [len(response) for response in group.responses]
    plain, punished = (
        torch.stack(
            [
                part[0]
                for part in torch.split(
                    prepare(make("rloo", missing_eos_penalty=penalty), [group], {}, {}, steps=1).given["advantages"][
                        group.id
                    ],
                    lengths,
                )
            ]
        )
        for penalty in (0.0, 3.0)
    )
    torch.testing.assert_close(punished - plain, torch.tensor([-3.0, 1.0, 1.0, 1.0]), rtol=0, atol=1e-5)
