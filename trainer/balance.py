"""Length balancing: a reward model is not to learn that long, or short, is good.

Each pair is put into a bucket by the difference of its two lengths. Inside a bucket, the pairs whose better reply is
the longer one come to weigh as much, together, as those whose better reply is the shorter one (Hou et al., 2024,
ChatGLM-RLHF, arXiv 2404.00934), so that within it length says nothing of which is better. Weighing loses no pair.

    n pairs in a bucket, l of them won by the longer      each of these weighs n / 2l, each of the others n / 2(n − l)

The mean weight stays 1. Buckets are fixed, in tokens, so that what later rounds bring falls into the same ones; where a
bucket has too few of either side to be balanced, it is one with the next shorter.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

EDGES = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Least difference, in tokens, of each bucket. Equal lengths are in none: they weigh 1."""

LEAST = 4.0
"""Weight of pairs that a bucket needs on both sides to be balanced by itself."""

Counts = Mapping[tuple[int, bool], float]
"""Weight of pairs by bucket and by whether the better reply is the longer one."""


def stratum(longer: int) -> tuple[int, bool] | None:
    """The bucket of a pair, and whether the better reply is the longer one, by how many tokens that is longer."""
    return (bisect.bisect_right(EDGES, abs(longer)) - 1, longer > 0) if longer else None


def count(pairs: Iterable[tuple[int, float]], before: Counts | None = None) -> dict[tuple[int, bool], float]:
    """What there is of each side of each bucket: of pairs given as (how much longer the better is, weight), and before
    them.
    """
    counts = dict(before or {})
    for longer, weight in pairs:
        if (place := stratum(longer)) is not None:
            counts[place] = counts.get(place, 0.0) + weight
    return counts


def factors(counts: Counts) -> dict[tuple[int, bool], float]:
    """By what to multiply the weight of a pair, by bucket and side. 1 for all where every pair was won by one side:
    nothing can be balanced then.
    """
    groups = _balanceable(counts)
    found = {}
    for group in groups:
        sides = {side: sum(counts.get((bucket, side), 0.0) for bucket in group) for side in (False, True)}
        for bucket in group:
            for side, held in sides.items():
                balanced = min(sides.values()) > 0.0
                found[bucket, side] = sum(sides.values()) / (2 * held) if balanced else 1.0
    return found


def weights(longer: Sequence[int], given: Sequence[float], before: Counts | None = None) -> list[float]:
    """The weights `given` of pairs, balanced; `before` is what was seen of pairs before these."""
    factor = factors(count(zip(longer, given, strict=True), before))
    places = map(stratum, longer)
    return [weight * (1.0 if place is None else factor[place]) for place, weight in zip(places, given, strict=True)]


def _balanceable(counts: Counts) -> list[list[int]]:
    """Buckets, together where one alone has too few of either side."""
    groups: list[list[int]] = []
    waiting: list[int] = []
    for bucket in reversed(range(len(EDGES))):
        waiting.append(bucket)
        if all(sum(counts.get((b, side), 0.0) for b in waiting) >= LEAST for side in (False, True)):
            groups.append(waiting)
            waiting = []
    if groups:
        groups[-1] += waiting  # the shortest have nothing below them
    else:
        groups = [waiting]
    return groups
