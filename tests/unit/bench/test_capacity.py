"""The simulation behind the plan, where its answer is known; and the plan's arithmetic."""

from __future__ import annotations

import pytest

from bench.capacity import CELL, Assumed, Spent, plan, replicas, waits

UNITS = {
    "generation": Spent(1e-4, 2_000, 1_700),
    "comparison": Spent(2e-3, 7_000, 3_700),
    "thumb": Spent(1e-3, 4_000, 1_800),
}


def test_one_slot_waits_as_the_theory_of_queues_says() -> None:
    """M/M/1 at load 0.5 and unit service: P(wait > t) = 0.5 exp(-t / 2), so the 99th percentile is 2 ln 50 = 7.8."""
    assert waits(0.5, 1, 1.0, requests=60_000) == pytest.approx(7.82, rel=0.1)


def test_with_room_nobody_waits_and_without_it_everybody_does() -> None:
    assert waits(10.0, 64, 1.0) == 0.0
    assert waits(80.0, 64, 1.0) > 5.0


def test_replicas_are_the_fewest_with_which_nobody_waits_long() -> None:
    assumed = Assumed()
    count, seconds = replicas(300.0, assumed), assumed.tokens / (assumed.gpu_tokens / assumed.gpu_slots)
    assert waits(300.0, count * assumed.gpu_slots, seconds) <= assumed.wait
    assert waits(300.0, (count - 1) * assumed.gpu_slots, seconds) > assumed.wait or (count - 1) * 64 < 300 * seconds


def test_a_plan_adds_up() -> None:
    one, thousand = plan(CELL, UNITS, Assumed()), plan(1_000 * CELL, UNITS, Assumed())
    requests, votes = 10 * CELL, CELL
    assert one["requests_a_second_at_the_peak"] == pytest.approx(requests / 86_400 * 3)
    assert one["record_terabytes_a_year"] == pytest.approx((requests * 2_000 + votes / 2 * 11_000) * 365 / 1e12)
    assert one["busiest_collector"] == pytest.approx((requests * 1e-4 + votes / 2 * 3e-3) / 86_400 * 3)
    assert thousand["policy_gpus"] == 1_000 * one["policy_gpus"]
    assert thousand["dollars_of_storing_a_million_votes"] == pytest.approx(one["dollars_of_storing_a_million_votes"])
