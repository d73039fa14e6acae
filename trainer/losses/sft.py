"""Next-token loss on demonstrations: −log π(y|x)/|y|. Mixed into another objective, it holds what was known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trainer import models
from trainer.batch import Batch
from trainer.losses.base import Losses, Objective
from trainer.samples import Demonstration, Kind


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning: every demonstration counts the same, however long it is."""

    name: str = "sft"
    kind: ClassVar[Kind] = Demonstration

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        nll = -batch.means(models.response_token_logprobs(model, batch))
        return Losses(nll, batch.weights, {"nll": nll.detach()})

    def settings(self) -> dict[str, str]:
        """See `Objective.settings`."""
        return {}
