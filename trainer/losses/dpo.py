"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290), and the NLL term that may go with it.

DPO alone is content to make the better response less likely, so long as the worse one becomes still less so; round by
round, answers then fall apart. α · −log π(y_w)/|y_w| (RPO: Pang et al., 2024, arXiv 2404.19733) holds against that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
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
    nll_weight: float = 0.0
    """α."""
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
        found = dpo_loss(chosen, rejected, *reference.chunk(2), beta=self.beta)
        if not self.nll_weight:
            return found
        lengths = torch.bincount(batch.owners, minlength=2 * batch.pairs)[: batch.pairs]
        return replace(found, losses=found.losses - self.nll_weight * chosen / lengths)

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {"beta": repr(self.beta), "nll_weight": repr(self.nll_weight)}
