"""Policy gradients with a baseline out of the group: several responses to a prompt, judged against each other.

    grpo   A = (R − mean) / (std + 10⁻⁴)   a ratio a token, mean over tokens   Shao et al., 2024, arXiv 2402.03300
    rloo   A = Rᵢ − mean of the others     a ratio a response                  Ahmadian et al., 2024, arXiv 2402.14740

Losses are max(−Aρ, −A·clip(ρ, 1 ± ε)). The KL to the reference is added to grpo's loss a token (k3), and taken off
rloo's rewards a response (log π/π₀).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from trainer import models
from trainer.batch import Batch
from trainer.losses import policy_gradient
from trainer.losses.base import Losses, Objective, Prepared, Round
from trainer.samples import Group, Kind
from trainer.staleness import importance_weights

if TYPE_CHECKING:
    from trainer.config import LearningSettings

_EPSILON = 1e-4


def group_advantages(rewards: Tensor) -> Tensor:
    """[n] advantages of grpo, of the [n] rewards of a group; zeros for a group of one."""
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + _EPSILON)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """[n] advantages of rloo, of the [n] rewards of a group; zeros for a group of one."""
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


@dataclass(frozen=True)
class Grpo(Objective):
    """GRPO or RLOO, by its name."""

    name: str
    kl_weight: float
    clip_range: float
    importance_min: float
    importance_max: float
    missing_eos_penalty: float
    kind: ClassVar[Kind] = Group

    @classmethod
    def from_settings(cls, name: str, settings: LearningSettings) -> Self:
        """As the settings say."""
        return cls(
            name,
            settings.kl_weight,
            settings.clip_range,
            settings.importance_min,
            settings.importance_max,
            settings.missing_eos_penalty,
        )

    @property
    def needs_reference(self) -> bool:
        """With a KL term."""
        return self.kl_weight > 0

    def prepare(self, round: Round) -> Prepared:
        """Advantages; and, where the policy will have moved by the time, what it says now."""
        groups = policy_gradient.groups(round.samples)
        kl_in_reward = self.name == "rloo" and self.kl_weight > 0
        # In a round of one step nothing has moved: what the policy says now comes with the loss.
        old = round.evaluate(models.response_token_logprobs, groups) if kl_in_reward or round.steps > 1 else {}
        advantages, scores = {}, []
        for group in groups:
            # A baseline that is the same for a whole group cancels out of both advantages.
            rewards = policy_gradient.rewards(
                group, missing_eos_penalty=self.missing_eos_penalty, reference_baseline=False
            )
            scores.append(rewards)
            if kl_in_reward:
                ratios = old[group.id] - round.reference[group.id]
                rewards = rewards - self.kl_weight * policy_gradient.response_sums(group, ratios)
            found = group_advantages(rewards) if self.name == "grpo" else leave_one_out_advantages(rewards)
            advantages[group.id] = found.repeat_interleave(torch.tensor(policy_gradient.lengths(group)))
        given = {"advantages": advantages, "old": old, "behaviour": policy_gradient.behaviour(groups)}
        counts = [count for group in groups for count in policy_gradient.lengths(group)]
        return Prepared(
            given={name: values for name, values in given.items() if values},
            constants={"importance_min": self.importance_min, "importance_max": self.importance_max},
            measures={"reward": torch.cat(scores).mean().item(), "response_tokens": sum(counts) / len(counts)},
        )

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        logprobs = models.response_token_logprobs(model, batch)
        old = batch.given.get("old", logprobs.detach())
        advantages = batch.given["advantages"]
        measures = {"entropy": -batch.means(logprobs.detach())}
        if self.name == "rloo":
            log_ratios, advantages = batch.sums(logprobs - old), batch.means(advantages)
            losses = policy_gradient.clipped_losses(log_ratios, advantages, self.clip_range)
            weights = self._response_weights(batch, old)
        else:
            log_ratios = logprobs - old
            losses = policy_gradient.clipped_losses(log_ratios, advantages, self.clip_range)
            weights = policy_gradient.token_weights(batch, old, constants)
        if weights is not None:
            losses = losses * weights
            measures["importance_weight"] = weights
        if self.kl_weight:
            kl = policy_gradient.kl_estimates(logprobs, batch.given["reference"])
            measures["kl"] = batch.sums(kl.detach())
            if self.name == "grpo":
                losses = losses + self.kl_weight * kl
        measures["clip_fraction"] = policy_gradient.clipped(log_ratios, advantages, self.clip_range)
        return Losses(losses if self.name == "rloo" else batch.means(losses), batch.weights, measures)

    def _response_weights(self, batch: Batch, old: Tensor) -> Tensor | None:
        if "behaviour" not in batch.given:
            return None
        return importance_weights(
            batch.sums(old),
            batch.sums(batch.given["behaviour"]),
            least=self.importance_min,
            greatest=self.importance_max,
        )
