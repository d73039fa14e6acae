"""The Bradley-Terry reward model: L = −log σ(r(x, y_w) − r(x, y_l))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import models
from trainer.batch import Batch
from trainer.losses.base import Losses, Objective, pairs
from trainer.losses.dpo import preference_measures


def ranking_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_w − r_l) of [B] scores."""
    return -functional.logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class Reward(Objective):
    """The ranking loss on a model with one score, read at the last token."""

    name: str = "reward"
    role: ClassVar[ModelRole.ValueType] = ModelRole.MODEL_ROLE_REWARD
    scores_text: ClassVar[bool] = True

    def load(self, path: Path) -> Any:
        """See `Objective.load`."""
        return models.load_scorer(path)

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        chosen, rejected = pairs(models.scores(model, batch))
        measures = preference_measures(chosen.detach(), rejected.detach())
        return Losses(ranking_losses(chosen, rejected), pairs(batch.weights)[0], measures)

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {}
