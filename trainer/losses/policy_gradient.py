"""What the objectives that learn from rewards have in common: rewards, clipped ratios, and correction for staleness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.samples import Group, Sample
from trainer.staleness import importance_weights


def groups(samples: Sequence[Sample]) -> list[Group]:
    """The samples, as what they are."""
    found = [sample for sample in samples if isinstance(sample, Group)]
    assert len(found) == len(samples), "an objective is given samples of its kind"
    return found


def rewards(group: Group, *, missing_eos_penalty: float, reference_baseline: bool) -> Tensor:
    """[n] rewards of a group's rollouts, in float32: the score, less the score of the reference's response to the same
    prompt (the baseline of Hou et al., 2024, arXiv 2404.00934), less the penalty where a response did not end.
    """
    baseline = group.reference_reward if reference_baseline and group.reference_reward is not None else 0.0
    return torch.tensor(
        [rollout.reward - baseline - (0.0 if rollout.finished else missing_eos_penalty) for rollout in group.rollouts]
    )


def lengths(group: Group) -> list[int]:
    """Tokens of each of a group's responses."""
    return [len(response) for response in group.responses]


def behaviour(samples: Sequence[Group]) -> dict[str, Tensor]:
    """By sample id, [T] log-probabilities as served, NaN where they were not recorded; empty where none was at all."""
    if not any(rollout.logprobs for group in samples for rollout in group.rollouts):
        return {}
    return {
        group.id: torch.tensor(
            [logprob for rollout in group.rollouts for logprob in rollout.logprobs or (math.nan,) * len(rollout.tokens)]
        )
        for group in samples
    }


def response_sums(group: Group, values: Tensor) -> Tensor:
    """[n] sums over each response's tokens, of `values` [T]."""
    return torch.stack([part.sum() for part in torch.split(values, lengths(group))])


def clipped_losses(log_ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """max(−Aρ, −A·clip(ρ, 1 ± ε)), elementwise, ρ = exp(log_ratios) (Schulman et al., 2017, arXiv 1707.06347)."""
    ratios = log_ratios.exp()
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip_range, 1 + clip_range))


def clipped(log_ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """1 where the ratio is clipped, so that there is no gradient; else 0."""
    ratios = log_ratios.detach().exp()
    high, low = (ratios > 1 + clip_range) & (advantages > 0), (ratios < 1 - clip_range) & (advantages < 0)
    return (high | low).float()


def kl_estimates(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimates of KL(π ‖ π₀) that are never negative: π₀/π − log π₀/π − 1 (Schulman's k3)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def token_weights(batch: Batch, old: Tensor, constants: Mapping[str, float]) -> Tensor | None:
    """[N] truncated importance weights of a batch's tokens; None where it is not known how they were served."""
    if "behaviour" not in batch.given:
        return None
    return importance_weights(
        old, batch.given["behaviour"], least=constants["importance_min"], greatest=constants["importance_max"]
    )
