"""The objectives, one a file, and the one place where their names are.

    "dpo"             one objective
    "dpo+0.1*sft"     a mixture: a weighted sum, in which each learns from the samples of its own kind

A step's loss is Σ weight · mean over the samples of that kind in the step. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thumbwheel import errors
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer.samples import Demonstration, Group, Kind, Pair, Thumb

if TYPE_CHECKING:
    from trainer.config import LearningSettings
    from trainer.losses.base import Objective
    from trainer.losses.mixture import Mixture

DPO_FAMILY = ("dpo", "ipo", "cdpo", "robust", "sigmoid_norm")

POLICY: dict[str, Kind] = {
    **dict.fromkeys(DPO_FAMILY, Pair),
    "kto": Thumb,
    "ppo": Group,
    "grpo": Group,
    "rloo": Group,
    "sft": Demonstration,
}
"""Objectives of a policy, and what each learns from."""

REWARD: dict[str, Kind] = {"reward": Pair}
"""Objectives of a reward model, and what each learns from."""

_TERM = re.compile(r"\s*(?:(?P<weight>[0-9.]+(?:e-?[0-9]+)?)\s*\*\s*)?(?P<name>[a-z_]+)\s*")


def names(role: ModelRole.ValueType) -> Sequence[str]:
    """Objectives of a role."""
    return tuple({ModelRole.MODEL_ROLE_POLICY: POLICY, ModelRole.MODEL_ROLE_REWARD: REWARD}.get(role, ()))


def role_of(text: str) -> ModelRole.ValueType:
    """What a model that learns by the objective `text` is for."""
    return ModelRole.MODEL_ROLE_REWARD if text.strip() in REWARD else ModelRole.MODEL_ROLE_POLICY


def parse(text: str, role: ModelRole.ValueType, *, field: str) -> dict[str, float]:
    """The weights of a mixture by the names of its objectives. Raises `errors.InvalidArgument` naming `field`."""
    weights: dict[str, float] = {}
    for part in text.split("+"):
        match = _TERM.fullmatch(part)
        name = match["name"] if match else part.strip()
        if match is None or name not in names(role):
            raise errors.InvalidArgument(
                f"is {text!r}, in which {name!r} is no objective of this role.",
                field=field,
                remedy=f"Use one of {', '.join(names(role)) or '(none)'}, or a mixture such as dpo+0.1*sft.",
            )
        if name in weights:
            raise errors.InvalidArgument(f"is {text!r}, which has {name} twice.", field=field, remedy="Name it once.")
        weights[name] = _weight(match["weight"], text, field)
    return weights


def _weight(weight: str | None, text: str, field: str) -> float:
    try:
        value = float(weight or 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise errors.InvalidArgument(
            f"is {text!r}, in which {weight} is no weight.", field=field, remedy="Use 0.1*sft."
        )
    return value


def kind(name: str) -> Kind:
    """What the objective called `name` learns from."""
    return (POLICY | REWARD)[name]


def objective(
    text: str, role: ModelRole.ValueType, settings: LearningSettings, *, field: str = "policy_objective"
) -> Mixture:
    """The objective, or the mixture of them, that `text` says. Raises `errors.InvalidArgument` naming `field`."""
    # Here, so that names can be listed without torch.
    from trainer.losses.mixture import Mixture, Term

    terms = parse(text, role, field=field)
    return Mixture(tuple(Term(weight, _make(name, settings)) for name, weight in terms.items()))


def _make(name: str, settings: LearningSettings) -> Objective:
    from trainer.losses.dpo import Dpo
    from trainer.losses.grpo import Grpo
    from trainer.losses.kto import Kto
    from trainer.losses.ppo import Ppo
    from trainer.losses.reward import Reward
    from trainer.losses.sft import Sft

    if name in DPO_FAMILY:
        return Dpo(name, settings.beta, settings.label_smoothing, settings.nll_weight)
    if name == "kto":
        return Kto(settings.beta, settings.seed)
    if name == "ppo":
        return Ppo.from_settings(settings)
    if name in ("grpo", "rloo"):
        return Grpo.from_settings(name, settings)
    return Sft() if name == "sft" else Reward.from_settings(settings)
