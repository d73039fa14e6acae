"""Bounds on chance, held against the exact probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.collector.curation.chance import poisson_tail, tail


@pytest.mark.parametrize(("votes", "p"), [(8, 0.5), (20, 0.3), (60, 0.75), (150, 0.46)])
def test_a_tail_is_never_underestimated_and_not_by_much_overestimated(votes: int, p: float) -> None:
    exact = [math.comb(votes, k) * p**k * (1 - p) ** (votes - k) for k in range(votes + 1)]
    for k in range(votes + 1):
        probability = sum(exact[k:] if k > p * votes else exact[: k + 1])
        bound = float(tail(np.array([float(votes)]), np.array([k / votes]), np.array([p]))[0])
        assert probability <= bound * (1 + 1e-9)
        assert bound <= probability * 3 * math.sqrt(votes) + 1e-12


def test_correlated_votes_count_as_fewer() -> None:
    """100 votes of correlation 0.02 are worth 100/2.98, about 34 of independent ones."""
    correlated = tail(np.array([100.0]), np.array([0.8]), np.array([0.5]), 0.02)
    independent = tail(np.array([100 / 2.98]), np.array([0.8]), np.array([0.5]))
    assert correlated == pytest.approx(independent)


@pytest.mark.parametrize("mean", [0.03, 0.4, 5.0])
def test_a_poisson_tail_is_never_underestimated(mean: float) -> None:
    for count in range(1, 25):
        exact = 1.0 - sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count))
        assert exact <= poisson_tail(count, mean) + 1e-12
    assert poisson_tail(21, 0.4) < 1e-20
    assert poisson_tail(0, mean) == 1.0
