"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import models
from trainer.batch import PairBatch
from trainer.losses import PairLoss


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> PairLoss:
    """−log σ(βΔ), Δ = (log π/π₀)(y_w) − (log π/π₀)(y_l). All arguments are [B] log-probabilities of whole responses."""
    chosen_ratios, rejected_ratios = chosen - reference_chosen, rejected - reference_rejected
    return PairLoss(
        losses=-functional.logsigmoid(beta * (chosen_ratios - rejected_ratios)),
        chosen_rewards=beta * chosen_ratios.detach(),
        rejected_rewards=beta * rejected_ratios.detach(),
    )


@dataclass(frozen=True)
class Dpo:
    """DPO on a causal language model."""

    beta: float
    name: str = "dpo"
    role: ModelRole.ValueType = ModelRole.MODEL_ROLE_POLICY
    needs_reference: bool = True
    scores_text: bool = False

    def load(self, path: Path) -> Any:
        """See `Objective.load`."""
        return models.load_causal(path)

    def loss(self, model: Any, batch: PairBatch, reference: Tensor | None) -> PairLoss:
        """See `Objective.loss`."""
        assert reference is not None
        chosen, rejected = models.response_logprobs(model, batch).chunk(2)
        return dpo_loss(chosen, rejected, *reference.chunk(2), beta=self.beta)

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {"beta": repr(self.beta)}
