"""Inside each bucket of length differences, both sides weigh the same: against a plain count."""

from __future__ import annotations

import random

import pytest

from trainer import balance


def drawn(count: int, seed: int) -> tuple[list[int], list[float]]:
    """Length differences, the more often negative the larger, and weights."""
    rng = random.Random(seed)
    longer = []
    for _ in range(count):
        size = int(rng.expovariate(1 / 30))
        longer.append(size if rng.random() > 0.5 + min(0.3, size / 200) else -size)
    return longer, [rng.choice([0.5, 1.0, 1.0, 2.0]) for _ in range(count)]


def bucket_of(longer: int) -> int:
    """The bucket, found by going through the edges."""
    return max(index for index, edge in enumerate(balance.EDGES) if edge <= abs(longer))


@pytest.mark.parametrize("seed", range(5))
def test_both_sides_of_every_bucket_weigh_the_same(seed: int) -> None:
    longer, given = drawn(600, seed)
    weights = balance.weights(longer, given)
    sides: dict[int, list[float]] = {}
    before: dict[int, list[float]] = {}
    for difference, weight, old in zip(longer, weights, given, strict=True):
        if difference:
            sides.setdefault(bucket_of(difference), [0.0, 0.0])[difference > 0] += weight
            before.setdefault(bucket_of(difference), [0.0, 0.0])[difference > 0] += old
        else:
            assert weight == old
    alone = [bucket for bucket, both in before.items() if min(both) >= balance.LEAST]
    assert len(alone) >= 8
    # The shortest takes in what is left below it, and each what is too rare above it.
    for bucket in sorted(alone)[1:]:
        if bucket + 1 in alone:
            assert sides[bucket][0] == pytest.approx(sides[bucket][1], abs=1e-5)
            assert sum(sides[bucket]) == pytest.approx(sum(before[bucket]), abs=1e-5)
    assert sum(weights) == pytest.approx(sum(given), abs=1e-5)
    # So over all, length does not say which is better any more.
    assert sum(w * (d > 0) - w * (d < 0) for d, w in zip(longer, weights, strict=True)) == pytest.approx(0.0, abs=1e-5)
    assert abs(sum(w * (d > 0) - w * (d < 0) for d, w in zip(longer, given, strict=True))) > 50


def test_too_few_of_one_side_are_balanced_with_the_next_shorter() -> None:
    longer = [100] * 9 + [-100] + [20] * 5 + [-20] * 5
    weights = balance.weights(longer, [1.0] * 20)
    assert weights[:9] == pytest.approx([20 / (2 * 14)] * 9)
    assert weights[9] == pytest.approx(20 / (2 * 6))
    assert weights[10:15] == pytest.approx([20 / (2 * 14)] * 5)


def test_what_one_side_won_throughout_cannot_be_balanced() -> None:
    assert balance.weights([5, 9, 200, 0], [1.0, 2.0, 1.0, 1.0]) == [1.0, 2.0, 1.0, 1.0]


def test_what_was_seen_before_counts() -> None:
    before = balance.count([(50, 30.0), (-50, 10.0)])
    assert balance.weights([50, -50], [1.0, 1.0], before) == pytest.approx([42 / (2 * 31), 42 / (2 * 11)])
    assert before == {(7, True): 30.0, (7, False): 10.0}
