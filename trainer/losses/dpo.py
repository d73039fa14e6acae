"""Direct preference optimization and its family: preferences straight into the policy.

With ρ = log π/π₀ of a whole response, Δ = ρ(y_w) − ρ(y_l), and Δ̄ the same of means over tokens:

    dpo            −log σ(βΔ)                                                Rafailov et al., 2023, arXiv 2305.18290
    cdpo           −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                           Mitchell, 2023
    robust         (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε)                Chowdhury et al., 2024, arXiv 2403.00409
    ipo            (Δ̄ − 1/2β)²                                               Azar et al., 2023, arXiv 2310.12036
    sigmoid_norm   −log σ(βΔ̄)                                                as TRL has it

To each may come α · −log π(y_w)/|y_w|, the NLL term of RPO (Pang et al., 2024, arXiv 2404.19733).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer import models
from trainer.batch import Batch
from trainer.losses.base import Losses, Objective, pairs


def preference_losses(
    name: str,
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    smoothing: float,
) -> Tensor:
    """[B] losses by the variant `name`, of [B] log-ratios ρ of whole responses and [B] numbers of their tokens."""
    delta = chosen - rejected
    if name == "dpo":
        return -logsigmoid(beta * delta)
    if name == "cdpo":
        return -(1 - smoothing) * logsigmoid(beta * delta) - smoothing * logsigmoid(-beta * delta)
    if name == "robust":
        kept, flipped = -(1 - smoothing) * logsigmoid(beta * delta), -smoothing * logsigmoid(-beta * delta)
        return (kept - flipped) / (1 - 2 * smoothing)
    mean_delta = chosen / chosen_lengths - rejected / rejected_lengths
    if name == "ipo":
        return (mean_delta - 1 / (2 * beta)) ** 2
    assert name == "sigmoid_norm", name
    return -logsigmoid(beta * mean_delta)


@dataclass(frozen=True)
class Dpo(Objective):
    """DPO, or another of its family, on a causal language model."""

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.1
    """ε of `cdpo` and `robust`."""
    nll_weight: float = 0.0
    """α."""

    @property
    def needs_reference(self) -> bool:
        """Yes: every variant compares with it."""
        return True

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        logprobs = batch.sums(models.response_token_logprobs(model, batch))
        chosen, rejected = pairs(logprobs - batch.sums(batch.given["reference"]))
        lengths = pairs(batch.lengths)
        losses = preference_losses(
            self.name, chosen, rejected, *lengths, beta=self.beta, smoothing=self.label_smoothing
        )
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        measures = preference_measures(*rewards)
        measures |= policy_measures((chosen, rejected), pairs(logprobs / batch.lengths))
        if self.nll_weight:
            nll = -pairs(logprobs)[0] / lengths[0]
            losses = losses + self.nll_weight * nll
            measures |= {"nll": nll.detach()}
        return Losses(losses, pairs(batch.weights)[0], measures)

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        found = {"beta": repr(self.beta)}
        if self.name in ("cdpo", "robust"):
            found["label_smoothing"] = repr(self.label_smoothing)
        if self.nll_weight:
            found["nll_weight"] = repr(self.nll_weight)
        return found


def policy_measures(ratios: tuple[Tensor, Tensor], logprobs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Estimates, [B], of KL(π ‖ π₀) in nats a response and of the entropy in nats a token, of pairs of [B] log-ratios
    and [B] mean log-probabilities a token. They hold for the policy that wrote the responses, as far as π is near to it
    still; a KL may be negative, unlike its mean.
    """
    return {"kl": (ratios[0] + ratios[1]).detach() / 2, "entropy": -(logprobs[0] + logprobs[1]).detach() / 2}


def preference_measures(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What is watched of [B] rewards of chosen and [B] of rejected responses."""
    margins = chosen - rejected
    return {
        "margin": margins,
        "accuracy": (margins > 0).float(),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
