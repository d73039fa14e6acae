"""What every objective has: how its model is loaded, what is worked out before gradients, and its loss.

prepare        once a round, without gradient: old log-probabilities, values, advantages
before_step    once an optimizer step, without gradient: what needs the whole step
loss           once a micro-batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import models
from trainer.batch import Batch
from trainer.samples import Kind, Pair, Sample

PerSample = Mapping[str, Tensor]
"""By sample id, [T] numbers for the T response tokens of the sample, in float32."""

Evaluate = Callable[[Callable[[Any, Batch], Tensor], Sequence[Sample]], dict[str, Tensor]]
"""Calls a function of model and batch, which returns [N], on samples without gradient: a `PerSample`."""


@dataclass(frozen=True)
class Losses:
    """What an objective says of U units (pairs or sequences); all float32."""

    losses: Tensor
    """[U] loss of every unit, not weighted."""

    weights: Tensor
    """[U] weights of the samples that they are of."""

    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """What is to be watched, without gradient: tensors of one dimension, of whose elements the mean is reported."""


@dataclass(frozen=True)
class Round:
    """What an objective may look at before it learns."""

    samples: Sequence[Sample]
    """Samples of its kind."""

    reference: PerSample
    """Log-probabilities under the reference, of `samples` and their companions; empty where none is wanted."""

    steps: int
    """Optimizer steps that will learn from them; with more than one, the policy moves away from where it was."""

    evaluate: Evaluate
    """Asks the model that learns, as it is now."""

    state: Mapping[str, float]
    """The objective's state."""


@dataclass(frozen=True)
class Prepared:
    """What an objective worked out for a round."""

    given: Mapping[str, PerSample] = field(default_factory=dict)
    """Numbers for response tokens, which batches then carry under these names."""

    constants: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the loss."""

    measures: Mapping[str, float] = field(default_factory=dict)
    """What is to be watched."""

    state: Mapping[str, float] = field(default_factory=dict)
    """What the objective's state has anew after the round."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at one rate."""

    parameters: list[Any]
    learning_rate: float
    frozen_steps: int = 0
    """Optimizer steps, from the base model on, in which they stay as they are."""


class Objective:
    """What is learnt from one kind of sample, and the kind of model it is learnt with. Subclasses are frozen."""

    role: ClassVar[ModelRole.ValueType] = ModelRole.MODEL_ROLE_POLICY
    """What its models are for."""

    kind: ClassVar[Kind] = Pair
    """What it learns from."""

    scores_text: ClassVar[bool] = False
    """Whether responses are taken as their text followed by end-of-text, as a scorer sees them, or as generated."""

    name: str
    """Its name in the registry."""

    @property
    def needs_reference(self) -> bool:
        """Whether it wants log-probabilities under the reference model."""
        return False

    def learns_from(self, sample: Sample) -> bool:
        """Whether it learns from this one. A pair of which neither is better teaches nothing, but where ties count."""
        return isinstance(sample, self.kind) and not (isinstance(sample, Pair) and sample.tie)

    def stratum(self, sample: Sample) -> str:
        """Samples of one stratum are spread evenly over the steps of a round."""
        return ""

    def load(self, path: Path) -> Any:
        """The model in `path`, in bf16. Raises `errors.FailedPrecondition` for one of another kind."""
        return models.load_causal(path)

    def parameter_groups(self, model: Any, learning_rate: float) -> list[ParameterGroup]:
        """All parameters, by the rate at which they learn."""
        return [ParameterGroup(list(model.parameters()), learning_rate)]

    def companions(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples whose log-probabilities are wanted besides, under the reference as well."""
        return ()

    def initial_state(self) -> dict[str, float]:
        """What it keeps from round to round."""
        return {}

    def prepare(self, round: Round) -> Prepared:
        """What is worked out once a round."""
        return Prepared()

    def before_step(self, round: Round, samples: Sequence[Sample]) -> Mapping[str, float]:
        """More constants, for the loss of the step that learns from `samples`."""
        return {}

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """Losses of a batch, which carries what was `given` and the `reference`."""
        raise NotImplementedError

    def next_state(self, state: Mapping[str, float], measures: Mapping[str, float], units: int) -> dict[str, float]:
        """The state after a round of so many units, for which `prepare` measured this."""
        return dict(state)

    def settings(self) -> dict[str, str]:
        """What belongs into the lineage."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return {name: repr(value) if isinstance(value, float) else str(value) for name, value in fields.items()}


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B] values of the chosen and [B] of the rejected sequences, of [2B] values of a batch of pairs."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def units(sample: Sample) -> int:
    """Of how many units the loss of a sample consists."""
    return 1 if isinstance(sample, Pair) else len(sample.responses)
