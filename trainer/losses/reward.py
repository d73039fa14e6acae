"""The Bradley-Terry reward model: L = −log σ(r(x, y_w) − r(x, y_l))."""

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


def ranking_loss(chosen: Tensor, rejected: Tensor) -> PairLoss:
    """−log σ(r_w − r_l) of [B] scores."""
    return PairLoss(-functional.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class Reward:
    """The ranking loss on a model with one score, read at the last token."""

    name: str = "reward"
    role: ModelRole.ValueType = ModelRole.MODEL_ROLE_REWARD
    needs_reference: bool = False
    scores_text: bool = True

    def load(self, path: Path) -> Any:
        """See `Objective.load`."""
        return models.load_scorer(path)

    def loss(self, model: Any, batch: PairBatch, reference: Tensor | None) -> PairLoss:
        """See `Objective.loss`."""
        return ranking_loss(*models.scores(model, batch).chunk(2))

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {}
