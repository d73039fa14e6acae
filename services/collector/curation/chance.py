"""How likely something is to be chance: bounds on tail probabilities, never too small.

All are Chernoff bounds (Boucheron, Lugosi, Massart 2013, chapter 2): `P(K/n as far from p as k/n, on its side) ≤
exp(-n·KL(k/n ‖ p))`, and for a Poisson number of mean λ `P(K ≥ k) ≤ exp(k - λ - k·ln(k/λ))`.
"""

from __future__ import annotations

import math

import numpy as np

from services.collector.curation.evidence import Floats


def tail(votes: Floats, rate: Floats, usual: Floats, correlation: float = 0.0) -> Floats:
    """Bound on the probability that a rate in so many votes is as far from the usual one, on its side of it.

    With correlation ρ, n votes count as `n / (1 + (n-1)ρ)` independent ones: the design effect of cluster sampling.
    """
    independent = votes / (1.0 + (votes - 1.0) * correlation)
    rate, usual = np.clip(rate, 1e-12, 1 - 1e-12), np.clip(usual, 1e-6, 1 - 1e-6)
    divergence = rate * np.log(rate / usual) + (1 - rate) * np.log((1 - rate) / (1 - usual))
    bound: Floats = np.exp(-independent * divergence)
    return bound


def poisson_tail(count: int, mean: float) -> float:
    """Bound on the probability of `count` or more where `mean` are expected; 1 where it is no more than that."""
    return math.exp(count - mean - count * math.log(count / mean)) if count > mean else 1.0
