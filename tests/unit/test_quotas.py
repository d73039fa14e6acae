"""What one tenant may take."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel import errors, quotas
from thumbwheel.quotas import Quotas


class Clock:
    """Time that is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _taken(limits: Quotas, tenant: str = "a") -> bool:
    try:
        with limits.call(tenant):
            return True
    except errors.ResourceExhausted:
        return False


def test_a_second_s_worth_at_once_and_then_the_rate() -> None:
    clock = Clock()
    limits = Quotas(rate=4.0, clock=clock)
    assert [_taken(limits) for _ in range(5)] == [True] * 4 + [False]
    with pytest.raises(errors.ResourceExhausted) as caught, limits.call("a"):
        pass
    assert caught.value.retry_after == pytest.approx(0.25)
    assert _taken(limits, "b")
    clock.now = 0.25
    assert [_taken(limits) for _ in range(2)] == [True, False]
    clock.now = 1000.0
    assert sum(_taken(limits) for _ in range(9)) == 4


def test_calls_at_once_are_given_back_however_they_end() -> None:
    limits = Quotas(at_once=2)
    with limits.call("a"), contextlib.suppress(KeyError), limits.call("a"):
        assert not _taken(limits)
        assert _taken(limits, "b")
        raise KeyError
    with limits.call("a"):
        assert _taken(limits)


def test_without_limits_nothing_is_kept() -> None:
    limits = Quotas()
    assert all(_taken(limits, str(number)) for number in range(100))
    assert not limits._tenants


def test_made_up_tenants_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_REMEMBERED", 10)
    limits = Quotas(at_once=1)
    with limits.call("busy"):
        for number in range(100):
            assert _taken(limits, str(number))
        assert len(limits._tenants) == 10
        assert not _taken(limits, "busy")  # who is calling is not forgotten


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 20))
def test_never_more_than_the_rate_and_a_burst(pauses: list[float], rate: float) -> None:
    clock, taken = Clock(), 0
    limits = Quotas(rate=rate, clock=clock)
    for pause in pauses:
        clock.now += pause
        taken += _taken(limits)
    assert taken <= max(1.0, rate) + clock.now * rate + 1e-6
