"""Kahneman-Tversky optimization: from thumbs, one response at a time (Ethayarajh et al., 2024, arXiv 2402.01306).

    liked       λ_D (1 − σ(β(ρ − z₀)))        ρ = log π/π₀ of the response
    disliked    λ_U (1 − σ(β(z₀ − ρ)))        z₀ = max(0, mean ρ of mismatched pairs), without gradient

z₀ estimates KL(π ‖ π₀) from responses put to other prompts; it is taken over a whole optimizer step.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer import models
from trainer.batch import Batch
from trainer.losses.base import Losses, Objective, Prepared, Round
from trainer.samples import Kind, Sample, Thumb

GREATEST_IMBALANCE = 4 / 3
"""Greatest λ_D n_D : λ_U n_U; the least is 1."""


def kto_losses(
    ratios: Tensor, liked: Tensor, z0: float, *, beta: float, desirable: float, undesirable: float
) -> Tensor:
    """[S] losses of [S] log-ratios ρ, [S] booleans and the two weights λ."""
    return torch.where(
        liked,
        desirable * (1 - torch.sigmoid(beta * (ratios - z0))),
        undesirable * (1 - torch.sigmoid(beta * (z0 - ratios))),
    )


def balancing_weights(liked: int, disliked: int) -> tuple[float, float]:
    """λ_D and λ_U, one of them 1 and the other at least 1, so that λ_D n_D : λ_U n_U is within 1:1 and 4:3.

    Equation 8 of the paper. Both are 1 where there are thumbs of one sort only: there is nothing to balance.
    """
    if not liked or not disliked:
        return 1.0, 1.0
    ratio = liked / disliked
    return max(1.0, 1 / ratio), max(1.0, ratio / GREATEST_IMBALANCE)


def mismatched(samples: Sequence[Sample], seed: int) -> dict[str, Thumb]:
    """By sample id, its prompt with the response to another one; empty for fewer than two samples.

    It depends on the samples and the seed alone, so that what the reference says of them can be worked out before.
    """
    thumbs = sorted((sample for sample in samples if isinstance(sample, Thumb)), key=lambda thumb: thumb.id)
    if len(thumbs) < 2:
        return {}
    random.Random(f"{seed}/kto").shuffle(thumbs)
    return {
        thumb.id: dataclasses.replace(thumb, id=f"{thumb.id}/mismatched", response=other.response)
        for thumb, other in zip(thumbs, [*thumbs[1:], thumbs[0]], strict=True)
    }


@dataclass(frozen=True)
class Kto(Objective):
    """KTO on a causal language model."""

    beta: float
    seed: int = 0
    name: str = "kto"
    kind: ClassVar[Kind] = Thumb

    @property
    def needs_reference(self) -> bool:
        """Yes."""
        return True

    def companions(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The mismatched pairs."""
        return tuple(mismatched(samples, self.seed).values())

    def prepare(self, round: Round) -> Prepared:
        """The weights of the two sorts."""
        liked = sum(isinstance(sample, Thumb) and sample.liked for sample in round.samples)
        desirable, undesirable = balancing_weights(liked, len(round.samples) - liked)
        return Prepared(constants={"desirable": desirable, "undesirable": undesirable})

    def before_step(self, round: Round, samples: Sequence[Sample]) -> Mapping[str, float]:
        """z₀ under the policy as it is now."""
        companions = mismatched(round.samples, self.seed)
        wanted = [companions[sample.id] for sample in samples if sample.id in companions]
        if not wanted:
            return {"z0": 0.0}
        now = round.evaluate(models.response_token_logprobs, wanted)
        ratios = [float((now[sample.id] - round.reference[sample.id]).sum()) for sample in wanted]
        return {"z0": max(0.0, sum(ratios) / len(ratios))}

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        logprobs = models.response_token_logprobs(model, batch)
        ratios = batch.sums(logprobs - batch.given["reference"])
        thumbs = [row.sample for row in batch.rows]
        liked = torch.tensor([isinstance(thumb, Thumb) and thumb.liked for thumb in thumbs], device=ratios.device)
        losses = kto_losses(
            ratios,
            liked,
            constants["z0"],
            beta=self.beta,
            desirable=constants["desirable"],
            undesirable=constants["undesirable"],
        )
        rewards = self.beta * ratios.detach()
        return Losses(
            losses,
            batch.weights,
            {
                "chosen_reward": rewards[liked],
                "rejected_reward": rewards[~liked],
                "kl": torch.full_like(rewards, constants["z0"]),
                "entropy": -batch.means(logprobs.detach()),
            },
        )

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {"beta": repr(self.beta)}
