"""PPO equals a plain implementation, number by number, and its gradients equal finite differences."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trainer.losses import trl_peer
from tests.unit.trainer.samples import make_groups
from thumbwheel import errors
from trainer import batch, models
from trainer.config import TrainerSettings
from trainer.losses import ppo
from trainer.losses.base import Prepared, Round
from trainer.losses.ppo import Ppo
from trainer.samples import Group, Rollout, Sample

GAMMA, LAMBDA, CLIP, VALUE_CLIP, BETA = 0.97, 0.9, 0.2, 0.3, 0.07

floats = st.floats(-3, 3, width=32)
responses = st.lists(st.lists(st.tuples(floats, floats), min_size=1, max_size=9), min_size=1, max_size=5)


def make(**changes: object) -> Ppo:
    settings = TrainerSettings(
        discount=GAMMA, gae_lambda=LAMBDA, clip_range=CLIP, value_clip_range=VALUE_CLIP, kl_weight=BETA
    )
    return Ppo.from_settings(settings.model_copy(update=changes))


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """By the definition: A_t = Σ_l (γλ)^l δ_{t+l}."""
    deltas = [
        reward + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, reward in enumerate(rewards)
    ]
    return [sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@given(parts=responses, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0))
def test_advantages_are_discounted_sums_of_surprises(
    parts: list[list[tuple[float, float]]], gamma: float, lam: float
) -> None:
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], batch_first=True)
    found = ppo.gae(padded[..., 0], padded[..., 1], discount=gamma, lam=lam)
    for row, part in zip(found, parts, strict=True):
        expected = plain_gae([reward for reward, _ in part], [value for _, value in part], gamma, lam)
        assert row[: len(part)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not row[len(part) :].any()


def test_without_bootstrapping_the_advantage_is_the_return_less_the_value() -> None:
    rewards, values = torch.tensor([[0.0, -1.0, 2.0]]), torch.tensor([[0.5, 0.25, 1.0]])
    found = ppo.gae(rewards, values, discount=1.0, lam=1.0)
    assert found.tolist() == [[0.5, 0.75, 1.0]]
    assert ppo.gae(rewards, values, discount=1.0, lam=0.0).tolist() == [[-0.25, -0.25, 1.0]]


@given(values=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40))
def test_whitened_values_have_mean_0_and_variance_1(values: list[float]) -> None:
    found = ppo.whiten(torch.tensor(values, dtype=torch.float64))
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    if max(values) - min(values) > 0.1:
        assert found.var(correction=0).item() == pytest.approx(1.0, abs=1e-3)


def evaluate_with(old: dict[str, Tensor], values: dict[str, Tensor]) -> Callable[..., dict[str, Tensor]]:
    def evaluate(function: Callable[..., Any], wanted: Sequence[Sample]) -> dict[str, Tensor]:
        found = old if function is models.response_token_logprobs else values
        return {sample.id: found[sample.id] for sample in wanted}

    return evaluate


def spoilt() -> list[Group]:
    """Groups: one has a reference reward; one a response that was cut, of which it is not known how it was served."""
    first, second = make_groups(2, rollouts=3, recorded=True)
    cut = dataclasses.replace(second.rollouts[1], finished=False, logprobs=())
    return [
        dataclasses.replace(first, reference_reward=0.75),
        dataclasses.replace(second, rollouts=(second.rollouts[0], cut, second.rollouts[2])),
    ]


def prepare(objective: Ppo, groups: list[Group]) -> tuple[Prepared, dict[str, dict[str, Tensor]]]:
    old, reference, values = (trl_peer.random_logprobs(groups, seed) for seed in (1, 2, 3))
    state = {"kl_weight": objective.kl_weight}
    round = Round(groups, reference, 4, evaluate_with(old, values), state)
    return objective.prepare(round), {"old": old, "reference": reference, "values": values}


def plain_preparation(groups: list[Group], found: dict[str, dict[str, Tensor]]) -> tuple[list[float], list[float]]:
    """Advantages before whitening, and returns, one token after the other."""
    advantages: list[float] = []
    returns: list[float] = []
    for group in groups:
        flat = {name: tensors[group.id].tolist() for name, tensors in found.items()}
        start = 0
        for rollout in group.rollouts:
            span = slice(start, start := start + len(rollout.tokens))
            rewards = [
                -BETA * (old - reference)
                for old, reference in zip(flat["old"][span], flat["reference"][span], strict=True)
            ]
            rewards[-1] += rollout.reward - (group.reference_reward or 0.0) - (0.0 if rollout.finished else 1.5)
            values = flat["values"][span]
            part = plain_gae(rewards, values, GAMMA, LAMBDA)
            advantages += part
            returns += [advantage + value for advantage, value in zip(part, values, strict=True)]
    return advantages, returns


def test_what_is_prepared_equals_a_plain_implementation() -> None:
    groups = spoilt()
    prepared, found = prepare(make(missing_eos_penalty=1.5), groups)
    advantages, returns = plain_preparation(groups, found)
    assert torch.cat([prepared.given["returns"][g.id] for g in groups]).tolist() == pytest.approx(returns, abs=1e-5)
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    assert torch.cat([prepared.given["advantages"][g.id] for g in groups]).tolist() == pytest.approx(
        [(advantage - mean) / deviation for advantage in advantages], abs=1e-5
    )
    kl = sum(float((found["old"][g.id] - found["reference"][g.id]).sum()) for g in groups) / 6
    assert prepared.measures["kl"] == pytest.approx(kl, abs=1e-4)
    assert prepared.measures["kl_weight"] == BETA
    without, _ = prepare(make(missing_eos_penalty=1.5, reference_baseline=False), groups)
    assert without.measures["reward"] - prepared.measures["reward"] == pytest.approx(0.75 / 2)


def worth_and_place(*, reference_baseline: bool) -> tuple[float, float]:
    """How tokens' advantages go, before the critic has learnt anything, with what their response earned, and with how
    near its end they are. One response of five is short and good, the others are cut; rewards are about those of
    `make bench-learning`.
    """
    rng = random.Random(0)
    groups, better, place = [], [], []
    for number in range(28):
        rollouts = []
        for index in range(4):
            good = (4 * number + index) % 5 == 0
            count, reward = (rng.randint(20, 50), -0.8) if good else (80, -2.6)
            rollouts.append(Rollout(tuple(range(3, 3 + count)), rng.gauss(reward, 0.2)))
            better += [float(good)] * count
            place += [0.95**left for left in reversed(range(count))]
        groups.append(Group(id=f"{number}", prompt=(3,), rollouts=tuple(rollouts), reference_reward=-2.4))
    nothing = {group.id: torch.zeros(group.response_tokens) for group in groups}
    objective = make(reference_baseline=reference_baseline, gae_lambda=0.95, discount=1.0, kl_weight=0.0)
    prepared = objective.prepare(Round(groups, {}, 4, evaluate_with(nothing, nothing), {"kl_weight": 0.0}))
    advantages = torch.cat([prepared.given["advantages"][group.id] for group in groups])
    found = torch.corrcoef(torch.stack([advantages, torch.tensor(better), torch.tensor(place)]))
    return found[0, 1].item(), found[0, 2].item()


def test_without_the_baseline_advantages_say_where_a_token_is_and_with_it_what_it_earned() -> None:
    worth, place = worth_and_place(reference_baseline=False)
    assert worth == pytest.approx(0.13, abs=0.05)
    assert place < -0.85
    worth, place = worth_and_place(reference_baseline=True)
    assert worth > 0.6
    assert abs(place) < 0.3


def plain_loss(groups: list[Group], prepared: Prepared, policy: list[float], values: list[float]) -> float:
    """Mean over responses of means over tokens, in plain numbers."""
    total, start, count = 0.0, 0, 0
    flat = {name: torch.cat([tensors[g.id] for g in groups]).tolist() for name, tensors in prepared.given.items()}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        tokens = 0.0
        for i in range(start, start + len(rollout.tokens)):
            old, advantage = flat["old"][i], flat["advantages"][i]
            ratio = math.exp(policy[i] - old)
            near = min(max(ratio, 1 - CLIP), 1 + CLIP)
            behaviour = flat["behaviour"][i]
            weight = 1.0 if math.isnan(behaviour) else min(max(math.exp(old - behaviour), 0.5), 5.0)
            near_value = min(max(values[i], flat["values"][i] - VALUE_CLIP), flat["values"][i] + VALUE_CLIP)
            target = flat["returns"][i]
            tokens += weight * max(-advantage * ratio, -advantage * near)
            tokens += 0.5 * max((values[i] - target) ** 2, (near_value - target) ** 2)
        total += tokens / len(rollout.tokens)
        start += len(rollout.tokens)
        count += 1
    return total / count


def test_the_loss_equals_a_plain_implementation_and_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = spoilt()
    objective = make(missing_eos_penalty=1.5)
    prepared, found = prepare(objective, groups)
    generator = torch.Generator().manual_seed(5)

    def moved(name: str) -> Tensor:
        flat = torch.cat([found[name][group.id] for group in groups]).double()
        return (flat + 0.3 * torch.randn(flat.shape, generator=generator, dtype=torch.float64)).requires_grad_()

    policy, values = moved("old"), moved("values")
    monkeypatch.setattr(models, "values", lambda critic, batch: values)
    monkeypatch.setattr(models, "response_token_logprobs", lambda model, batch: policy)
    layout = batch.collate(batch.whole(groups), prepared.given)
    model: Any = type("Model", (), {"critic": None})
    loss = objective.loss(model, dataclasses.replace(layout, lengths=layout.lengths.double()), prepared.constants)
    numbers = policy.tolist(), values.tolist()
    assert loss.losses.mean().item() == pytest.approx(plain_loss(groups, prepared, *numbers), abs=1e-6)
    assert 0 < loss.measures["clip_fraction"].mean() < 1
    assert loss.measures["importance_weight"].min() >= 0.5

    gradients = torch.autograd.grad(loss.losses.mean(), [policy, values])
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for index in range(len(gradient)):
            sides = []
            for sign in (1, -1):
                near = [list(part) for part in numbers]
                near[which][index] += sign * step
                sides.append(plain_loss(groups, prepared, *near))
            assert gradient[index].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-5)


@given(kl=st.floats(0, 100), target=st.floats(0.1, 20), weight=st.floats(1e-4, 1))
def test_the_kl_weight_moves_towards_the_target_and_never_by_much(kl: float, target: float, weight: float) -> None:
    found = ppo.adapted_kl_weight(weight, kl, target=target, responses=100, horizon=10_000)
    assert abs(found / weight - 1) <= 0.2 * 100 / 10_000 + 1e-9
    assert (found - weight) * (kl - target) >= 0
    assert ppo.adapted_kl_weight(weight, kl, target=0.0, responses=100, horizon=10_000) == weight


def test_the_kl_weight_is_kept_between_rounds() -> None:
    objective = make(kl_target=2.0, kl_horizon=100)
    state = objective.initial_state()
    assert state == {"kl_weight": BETA}
    state = objective.next_state(state, {"kl": 2.2}, 10)
    assert state["kl_weight"] == pytest.approx(BETA * (1 + 0.1 * 10 / 100))


def test_the_critic_begins_without_opinion_or_from_a_reward_model(policy_path: Path, reward_path: Path) -> None:
    groups = make_groups(2)
    layout = batch.collate(batch.whole(groups))
    fresh = make().load(policy_path)
    with torch.no_grad():
        assert not models.values(fresh.critic, layout).any()
        assert models.values(make(critic_model=str(reward_path)).load(policy_path).critic, layout).any()
        own = models.load_causal(policy_path)
        torch.testing.assert_close(
            models.response_token_logprobs(fresh, layout), models.response_token_logprobs(own, layout), rtol=0, atol=0
        )
    with pytest.raises(errors.MissingModel, match=r"There is no model in nowhere. Name a reward model's folder"):
        make(critic_model="nowhere").load(policy_path)
    policy, critic = make(critic_warmup_steps=3).parameter_groups(fresh, 1e-6)
    assert (policy.learning_rate, policy.frozen_steps) == (1e-6, 3)
    assert (critic.learning_rate, critic.frozen_steps) == (9e-6, 0)
    assert len(policy.parameters) + len(critic.parameters) == len(list(fresh.parameters()))
