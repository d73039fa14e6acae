"""The objectives, one a file, and the one place where their names are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thumbwheel import errors
from thumbwheel.v1.rollout_pb2 import ModelRole

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.batch import PairBatch
    from trainer.config import TrainerSettings


@dataclass(frozen=True)
class PairLoss:
    """What an objective says of B pairs; all float32."""

    losses: Tensor
    """[B] loss of every pair, not weighted."""

    chosen_rewards: Tensor
    """[B] reward of the better responses, without gradient: the margin and the accuracy follow from these."""

    rejected_rewards: Tensor
    """[B] reward of the worse responses, without gradient."""


class Objective(Protocol):
    """What a task learns, and the kind of model it learns it with."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        ...

    @property
    def role(self) -> ModelRole.ValueType:
        """What its models are for."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` wants log-probabilities of the reference model."""
        ...

    @property
    def scores_text(self) -> bool:
        """Whether responses are taken as their text followed by end-of-text, as a scorer sees them, or as generated."""
        ...

    def load(self, path: Path) -> Any:
        """The model in `path`, in bf16. Raises `errors.CorruptCheckpoint` for one of another kind."""
        ...

    def loss(self, model: Any, batch: PairBatch, reference: Tensor | None) -> PairLoss:
        """Loss of a batch; `reference` is [2B], log-probabilities of all sequences under the reference model."""
        ...

    def settings(self) -> dict[str, str]:
        """What belongs into the lineage."""
        ...


def names(role: ModelRole.ValueType) -> Sequence[str]:
    """Objectives of a role."""
    return {ModelRole.MODEL_ROLE_POLICY: ("dpo",), ModelRole.MODEL_ROLE_REWARD: ("reward",)}.get(role, ())


def objective(name: str, role: ModelRole.ValueType, settings: TrainerSettings) -> Objective:
    """The objective called `name`. Raises `errors.InvalidArgument` where the role has none of that name."""
    # Here, so that names can be listed without torch.
    from trainer.losses.dpo import Dpo
    from trainer.losses.reward import Reward

    if name not in names(role):
        field = "policy_objective" if role == ModelRole.MODEL_ROLE_POLICY else "reward_objective"
        raise errors.InvalidArgument(
            f"is {name!r}.", field=field, remedy=f"Use one of {', '.join(names(role)) or '(none)'}."
        )
    return Dpo(settings.beta, settings.nll_weight) if name == "dpo" else Reward()
