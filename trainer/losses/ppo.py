"""Proximal policy optimization with a critic (Schulman et al., 2017, arXiv 1707.06347).

    rewards       rₜ = −β (log π_old − log π₀)ₜ, and the score at the last token
    advantages    δₜ = rₜ + γVₜ₊₁ − Vₜ,  Aₜ = δₜ + γλAₜ₊₁ (Schulman et al., 2015, arXiv 1506.02438), whitened
    policy        max(−Aρ, −A·clip(ρ, 1 ± ε))
    critic        ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²),  R = A + V_old before whitening
    β             fixed, or β ← β (1 + e·n/horizon), e = clip(KL/target − 1, ±0.2) (Ziegler et al., 2019, 1909.08593)

Both losses are means over a response's tokens, and then over responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from thumbwheel import errors
from trainer import models
from trainer.batch import Batch
from trainer.losses import policy_gradient
from trainer.losses.base import Losses, Objective, ParameterGroup, Prepared, Round
from trainer.samples import Group, Kind

if TYPE_CHECKING:
    from trainer.config import LearningSettings

_GREATEST_ERROR = 0.2


def token_rewards(scores: Tensor, old: Tensor, reference: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """[S, T] rewards of the tokens of S responses, padded with zeros on the right, of their [S] scores and the [S, T]
    log-probabilities under the policy and the reference. `mask` [S, T] says which tokens there are.
    """
    found = -kl_weight * (old - reference) * mask
    last = mask.sum(1, dtype=torch.long) - 1
    return found.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, *, discount: float, lam: float) -> Tensor:
    """[S, T] generalised advantage estimates, of [S, T] rewards and values, zero after each response's end."""
    advantages, following, later = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + discount * following - values[:, t] + discount * lam * later
        following = values[:, t]
        advantages.append(later)
    return torch.stack(advantages[::-1], dim=1)


def whiten(values: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1; values that are all the same become 0."""
    return (values - values.mean()) * (values.var(correction=0) + 1e-8).rsqrt()


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), elementwise."""
    near = torch.clamp(values, old - clip_range, old + clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def adapted_kl_weight(weight: float, kl: float, *, target: float, responses: int, horizon: int) -> float:
    """β after so many responses, whose mean KL to the reference was `kl` nats; as it is where `target` is 0."""
    if not target:
        return weight
    error = min(max(kl / target - 1, -_GREATEST_ERROR), _GREATEST_ERROR)
    return weight * (1 + error * responses / horizon)


@dataclass(frozen=True)
class Ppo(Objective):
    """PPO with a policy and a critic in one learner."""

    kl_weight: float
    """β at the start."""
    kl_target: float
    kl_horizon: int
    clip_range: float
    value_clip_range: float
    discount: float
    gae_lambda: float
    missing_eos_penalty: float
    reference_baseline: bool
    importance_min: float
    importance_max: float
    critic_model: str
    critic_learning_rate: float
    critic_warmup_steps: int
    name: str = "ppo"
    kind: ClassVar[Kind] = Group

    @classmethod
    def from_settings(cls, settings: LearningSettings) -> Self:
        """As the settings say."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "name"]
        return cls(**{name: getattr(settings, name) for name in names})

    @property
    def needs_reference(self) -> bool:
        """With a KL term."""
        return self.kl_weight > 0

    def load(self, path: Path) -> models.ActorCritic:
        """The policy in `path`, and a critic: the reward model of the settings, or a zero head on the policy's body.

        Raises `errors.MissingModel` and `errors.FailedPrecondition`.
        """
        if not self.critic_model:
            return models.ActorCritic(models.load_causal(path), models.new_scorer(path))
        if not Path(self.critic_model, "config.json").is_file():
            raise errors.MissingModel(
                f"There is no model in {self.critic_model}.", remedy="Name a reward model's folder by --critic-model."
            )
        return models.ActorCritic(models.load_causal(path), models.load_scorer(Path(self.critic_model)))

    def parameter_groups(self, model: models.ActorCritic, learning_rate: float) -> list[ParameterGroup]:
        """The policy, which waits for the critic to warm up, and the critic."""
        return [
            ParameterGroup(list(model.policy.parameters()), learning_rate, self.critic_warmup_steps),
            ParameterGroup(list(model.critic.parameters()), self.critic_learning_rate),
        ]

    def initial_state(self) -> dict[str, float]:
        """β."""
        return {"kl_weight": self.kl_weight}

    def prepare(self, round: Round) -> Prepared:
        """What policy and critic say now, and the advantages and returns that follow from it."""
        groups = policy_gradient.groups(round.samples)
        old = round.evaluate(models.response_token_logprobs, groups)
        values = round.evaluate(lambda model, batch: models.values(model.critic, batch), groups)
        reference = round.reference if self.needs_reference else old
        sizes = [count for group in groups for count in policy_gradient.lengths(group)]
        old_rows, value_rows, reference_rows = (
            pad_sequence(list(torch.split(torch.cat([found[group.id] for group in groups]), sizes)), batch_first=True)
            for found in (old, values, reference)
        )
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        scores = torch.cat(
            [
                policy_gradient.rewards(
                    group,
                    missing_eos_penalty=self.missing_eos_penalty,
                    reference_baseline=self.reference_baseline,
                )
                for group in groups
            ]
        )
        rewards = token_rewards(scores, old_rows, reference_rows, mask, round.state["kl_weight"])
        advantages = gae(rewards, value_rows, discount=self.discount, lam=self.gae_lambda)[mask]
        totals = [group.response_tokens for group in groups]
        found = {"advantages": whiten(advantages), "returns": advantages + value_rows[mask]}
        given: dict[str, Mapping[str, Tensor]] = {"old": old, "values": values}
        for name, flat in found.items():
            given[name] = dict(zip([group.id for group in groups], torch.split(flat, totals), strict=True))
        if recorded := policy_gradient.behaviour(groups):
            given["behaviour"] = recorded
        return Prepared(
            given=given,
            constants={"importance_min": self.importance_min, "importance_max": self.importance_max},
            measures={
                "reward": scores.mean().item(),
                "response_tokens": sum(sizes) / len(sizes),
                "kl": ((old_rows - reference_rows) * mask).sum(1).mean().item(),
                "kl_weight": round.state["kl_weight"],
            },
        )

    def loss(self, model: models.ActorCritic, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        given = batch.given
        logprobs = models.response_token_logprobs(model, batch)
        log_ratios = logprobs - given["old"]
        policy = policy_gradient.clipped_losses(log_ratios, given["advantages"], self.clip_range)
        measures = {
            "clip_fraction": policy_gradient.clipped(log_ratios, given["advantages"], self.clip_range),
            "entropy": -batch.means(logprobs.detach()),
        }
        if (weights := policy_gradient.token_weights(batch, given["old"], constants)) is not None:
            policy = policy * weights
            measures["importance_weight"] = weights
        values = models.values(model.critic, batch)
        critic = value_losses(values, given["values"], given["returns"], self.value_clip_range)
        measures |= {"policy_loss": batch.means(policy.detach()), "value_loss": batch.means(critic.detach())}
        return Losses(batch.means(policy) + batch.means(critic), batch.weights, measures)

    def next_state(self, state: Mapping[str, float], measures: Mapping[str, float], units: int) -> dict[str, float]:
        """β adapted to the KL of the round."""
        weight = adapted_kl_weight(
            state["kl_weight"],
            measures["kl"],
            target=self.kl_target,
            responses=units,
            horizon=self.kl_horizon,
        )
        return {"kl_weight": weight}
