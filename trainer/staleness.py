"""Rollouts that are older than the policy that learns from them: how much they count, and which are dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thumbwheel import errors

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.samples import Group, Sample


def importance_weights(old: Tensor, behaviour: Tensor, *, least: float, greatest: float) -> Tensor:
    """clip(π_old / π_rollout, c_min, c_max), without gradient, of log-probabilities of the same shape.

    `old` is under the policy at the start of the round, around which ratios are clipped; `behaviour` as recorded when
    the tokens were served. What was not recorded is NaN there and has weight 1. The truncation bounds the variance
    (Espeholt et al., 2018, arXiv 1802.01561); clipping around π_old and weighting by π_old / π_rollout is the decoupled
    objective (Fu et al., 2025, arXiv 2505.24298).
    """
    return (old - behaviour).detach().nan_to_num(nan=0.0).exp().clamp(least, greatest)


def sequence(version: str) -> int:
    """The sequence number of a version's name, such as 12 of `policy-000012`. Raises `errors.InvalidArgument`."""
    number = version.rpartition("-")[2]
    if not number.isdecimal():
        raise errors.InvalidArgument(f"is {version[:64]!r}, which names no version.", field="versions")
    return int(number)


def staleness(sample: Sample, newest: int) -> int:
    """How many versions before `newest` the oldest one is that wrote a part of the sample; 0 where none did."""
    return max((newest - sequence(version) for version in sample.versions), default=0)


@dataclass(frozen=True)
class Freshness:
    """What was kept and what was dropped, and how old what was kept is."""

    kept: tuple[Group, ...]
    dropped: int
    mean: float
    """Mean staleness of what was kept, in versions."""
    greatest: int
    """Greatest staleness of what was kept."""


def fresh(samples: Iterable[Group], newest: int, max_staleness: int) -> Freshness:
    """Drops what is more than `max_staleness` versions old."""
    aged = [(staleness(sample, newest), sample) for sample in samples]
    ages = [age for age, _ in aged if age <= max_staleness]
    return Freshness(
        kept=tuple(sample for age, sample in aged if age <= max_staleness),
        dropped=len(aged) - len(ages),
        mean=sum(ages) / len(ages) if ages else 0.0,
        greatest=max(ages, default=0),
    )
