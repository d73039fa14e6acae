"""Calibration's numbers, on margins whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer import calibration


def drawn(count: int, temperature: float, seed: int = 0) -> calibration.Array:
    """Margins that are right as often as σ(margin / temperature) says."""
    rng = np.random.default_rng(seed)
    sizes = rng.normal(0, 2, count)
    right = rng.random(count) < 1 / (1 + np.exp(-np.abs(sizes) / temperature))
    return np.where(right, np.abs(sizes), -np.abs(sizes))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    assert calibration.fit_temperature(drawn(20_000, temperature)) == pytest.approx(temperature, rel=0.06)


def test_the_temperature_minimises_the_loss() -> None:
    margins = drawn(500, 2.0)
    best = calibration.fit_temperature(margins)
    least = calibration.nll(margins, best)
    assert min(calibration.nll(margins, best * factor) for factor in (0.8, 0.95, 1.05, 1.25)) > least


def test_margins_that_say_nothing_have_no_confidence() -> None:
    assert calibration.fit_temperature(-drawn(500, 1.0)) == pytest.approx(1000.0)


def test_ece_is_the_gap_that_overconfidence_leaves() -> None:
    margins = drawn(50_000, 3.0)
    assert calibration.ece(margins, 3.0) < 0.01
    assert calibration.ece(margins, 1.0) > 0.1
    calibrated, temperature = calibration.cross_fitted_ece(margins)
    assert calibrated < 0.01
    assert temperature == pytest.approx(3.0, rel=0.06)
    # By hand: ten given 0.95 each, of which seven are right, are 0.25 off.
    sure = math.log(0.95 / 0.05)
    assert calibration.ece(np.array([sure] * 7 + [-sure] * 3)) == pytest.approx(0.25)


def test_the_curve_is_its_own_mirror_image() -> None:
    bins = calibration.reliability(drawn(2_000, 1.0))
    for bin, mirrored in zip(bins, reversed(bins), strict=True):
        assert bin.predicted == pytest.approx(1 - mirrored.predicted)
        assert bin.observed == pytest.approx(1 - mirrored.observed)


def test_intervals_of_shares() -> None:
    assert calibration.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai and DasGupta, 2001
    assert calibration.wilson(0, 0) == (0.0, 1.0)


def test_correlations() -> None:
    assert calibration.correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert calibration.correlation([1.0, 1.0], [2.0, 4.0]) == 0.0
    assert calibration.accuracy(np.array([1.0, -1.0, 0.0, 2.0])) == 0.625
