"""A weighted sum of objectives, each of which learns from the samples of its own kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer.losses.base import Objective, ParameterGroup
from trainer.samples import Sample


@dataclass(frozen=True)
class Term:
    """An objective and its weight."""

    weight: float
    objective: Objective

    def mine(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of the samples that it learns from."""
        return [sample for sample in samples if self.objective.learns_from(sample)]


@dataclass(frozen=True)
class Mixture:
    """One or more objectives of one role. At most one of them brings a model of its own kind."""

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        """As it is written, such as `dpo+0.1*sft`."""
        return "+".join(
            term.objective.name if term.weight == 1 else f"{term.weight:g}*{term.objective.name}" for term in self.terms
        )

    @property
    def role(self) -> ModelRole.ValueType:
        """What its models are for."""
        return self.terms[0].objective.role

    @property
    def scores_text(self) -> bool:
        """See `Objective.scores_text`."""
        return self.terms[0].objective.scores_text

    @property
    def needs_reference(self) -> bool:
        """Whether any of them wants the reference."""
        return any(term.objective.needs_reference for term in self.terms)

    @property
    def wants_baseline(self) -> bool:
        """Whether any of them takes the score of the reference's response off the reward."""
        return any(getattr(term.objective, "reference_baseline", False) for term in self.terms)

    def learns_from(self, sample: Sample) -> bool:
        """Whether any of them learns from a sample."""
        return any(term.objective.learns_from(sample) for term in self.terms)

    def stratum(self, sample: Sample) -> str:
        """See `Objective.stratum`."""
        return "/".join(term.objective.stratum(sample) for term in self.terms if term.objective.learns_from(sample))

    def referenced(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples whose log-probabilities under the reference are wanted, and those of their companions."""
        found: list[Sample] = []
        for term in self.terms:
            if term.objective.needs_reference:
                mine = term.mine(samples)
                found += [*mine, *term.objective.companions(mine)]
        return list({sample.id: sample for sample in found}.values())

    def load(self, path: Path) -> Any:
        """See `Objective.load`."""
        return self._leading.load(path)

    def parameter_groups(self, model: Any, learning_rate: float) -> list[ParameterGroup]:
        """See `Objective.parameter_groups`."""
        return self._leading.parameter_groups(model, learning_rate)

    def settings(self) -> dict[str, str]:
        """What belongs into the lineage; in a mixture, each under the objective's name."""
        if len(self.terms) == 1:
            return self.terms[0].objective.settings()
        return {
            f"{term.objective.name}.{name}": value
            for term in self.terms
            for name, value in {"weight": repr(term.weight), **term.objective.settings()}.items()
        }

    @property
    def _leading(self) -> Objective:
        """The one whose model also serves the others."""
        for term in self.terms:
            if type(term.objective).load is not Objective.load:
                return term.objective
        return self.terms[0].objective
