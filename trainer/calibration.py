"""How well scores say what people prefer: accuracy, calibration, and what they owe to length. Plain numbers, no model.

A margin is the score of the response that people preferred less that of the other, so it is right where it is above 0,
and σ(margin / temperature) is the probability that was given to what they said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 10
"""Of probabilities, each a tenth wide."""

_LEAST_SCALE, _GREATEST_SCALE = 1e-3, 1e3


@dataclass(frozen=True)
class Bin:
    """Comparisons to which a like probability was given."""

    count: int
    predicted: float
    """Mean probability that the first is preferred."""
    observed: float
    """Share of those in which it was."""


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, n = right / count, float(count)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def accuracy(margins: Array) -> float:
    """Share of margins above 0; a margin of 0 is half right."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def nll(margins: Array, temperature: float = 1.0) -> float:
    """Mean of −log σ(margin / temperature)."""
    return float(np.mean(np.logaddexp(0.0, -margins / temperature)))


def fit_temperature(margins: Array) -> float:
    """The temperature that makes the margins likeliest (Guo et al., 2017, arXiv 1706.04599), by Newton's method on its
    inverse. At most 1,000 (the margins say nothing, or the wrong) and at least 0.001 (they are never wrong).
    """
    low, high = math.log(_LEAST_SCALE), math.log(_GREATEST_SCALE)
    # The loss is convex in the scale: its derivative rises, and bisection finds where it is 0.
    for _ in range(60):
        middle = (low + high) / 2
        slope = -float(np.mean(margins / (1 + np.exp(np.clip(math.exp(middle) * margins, -700, 700)))))
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1.0 / math.exp((low + high) / 2)


def reliability(margins: Array, temperature: float = 1.0) -> list[Bin]:
    """Predicted and observed, by bins of the predicted probability. Each comparison counts both ways round, since
    which one is called the first is arbitrary; so the curve is its own mirror image.
    """
    given = 1 / (1 + np.exp(-np.clip(margins / temperature, -700, 700)))
    predicted = np.concatenate([given, 1 - given])
    observed = np.concatenate([np.ones_like(given), np.zeros_like(given)])
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return [
        Bin(int(inside.sum()), float(predicted[inside].mean()), float(observed[inside].mean()))
        for index in range(BINS)
        if (inside := place == index).any()
    ]


def ece(margins: Array, temperature: float = 1.0) -> float:
    """Expected calibration error: mean of |predicted − observed| over bins, by what is in them (Guo et al., 2017)."""
    bins = reliability(margins, temperature)
    total = sum(bin.count for bin in bins)
    return sum(bin.count * abs(bin.predicted - bin.observed) for bin in bins) / total


def cross_fitted_ece(margins: Array, folds: int = 5) -> tuple[float, float]:
    """ECE after calibration, each fold by the temperature that fits the others, so that no number judges itself; and
    the temperature that fits all.
    """
    scaled = np.empty_like(margins)
    for fold in range(folds):
        inside = np.arange(len(margins)) % folds == fold
        scaled[inside] = margins[inside] / fit_temperature(margins[~inside])
    return ece(scaled), fit_temperature(margins)


def correlation(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) < 2 or a.std() == 0.0 or b.std() == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def length_correlation(margins: Array, longer: Array) -> float:
    """Correlation of score margin and length difference, over pairs both ways round.

    Which of a pair comes first must not matter, so each counts both ways, as in the calibration curve. Then both have
    mean 0, and that the preferred reply is shorter on the average does not hide how scores go with length.
    """
    norms = math.sqrt(float((margins**2).sum() * (longer**2).sum()))
    return float((margins * longer).sum()) / norms if norms else 0.0
