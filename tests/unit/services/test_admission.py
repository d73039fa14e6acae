"""Who may come in: at once while there is room, later while the wait is short, told to retry where it is not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.admission import Admission, Ticket
from thumbwheel import calls, errors


class Engine:
    """An engine of 4 slots that gives each sequence in it 10 tokens a second, on a clock that is told."""

    def __init__(self, *, max_wait: float = 2.0, kv_tokens: int | None = None) -> None:
        self.now = 0.0
        self.admission = Admission(slots=4, most=1000, max_wait=max_wait, kv_tokens=kv_tokens, clock=lambda: self.now)
        self._in: list[tuple[contextlib.ExitStack, Ticket]] = []

    def come(self, *, allowed: int = 20, sequences: int = 1, prompt: int = 0) -> bool:
        stack = contextlib.ExitStack()
        try:
            ticket = stack.enter_context(self.admission.admit(prompt=prompt, allowed=allowed, sequences=sequences))
        except errors.ResourceExhausted:
            return False
        self._in.append((stack, ticket))
        return True

    def go(self, used: int | None = 20) -> None:
        stack, ticket = self._in.pop(0)
        ticket.used = used
        stack.close()

    def work(self, rounds: int) -> None:
        """Keeps the engine full: every 2 seconds four sequences of 20 tokens end and four come."""
        for _ in range(rounds):
            self.now += 2.0
            for _ in range(4):
                self.go()
            for _ in range(4):
                assert self.come()


def test_while_there_is_room_everyone_comes_in() -> None:
    engine = Engine(max_wait=1e-9)
    assert [engine.come() for _ in range(4)] == [True] * 4
    assert engine.admission.in_flight == 4


def test_one_call_larger_than_the_engine_comes_in_alone() -> None:
    engine = Engine()
    assert engine.come(sequences=200)
    assert [engine.come(sequences=200) for _ in range(2)] == [False, False]
    engine.go()
    assert engine.admission.in_flight == 0
    assert engine.come(sequences=200)


def test_unmeasured_one_engine_s_worth_may_queue() -> None:
    engine = Engine()
    assert sum(engine.come() for _ in range(20)) == 8


def test_measured_the_wait_decides_and_is_told() -> None:
    engine = Engine(max_wait=2.0)
    for _ in range(4):
        engine.come()
    engine.work(10)
    # 40 tokens a second, 20 a sequence: two sequences end each second, so four may queue for two seconds.
    assert engine.admission.expected_wait() == pytest.approx(0.5)
    assert sum(engine.come() for _ in range(20)) == 4
    assert engine.admission.expected_wait() == pytest.approx(2.5)
    with pytest.raises(errors.ResourceExhausted) as caught, engine.admission.admit(prompt=0, allowed=20):
        pass
    assert caught.value.retry_after == pytest.approx(0.5)


def test_what_responses_really_take_is_learnt() -> None:
    engine = Engine(max_wait=2.2)
    for _ in range(4):
        engine.come(allowed=200)
    for _ in range(400):  # each is allowed 200 tokens and takes 20
        engine.now += 0.5
        engine.go(20)
        assert engine.come(allowed=200)
    assert engine.admission._share == pytest.approx(0.1, abs=0.01)
    assert sum(engine.come(allowed=200) for _ in range(20)) == 4


def test_a_slack_time_says_nothing_of_what_the_engine_can_do() -> None:
    engine = Engine()
    for _ in range(4):
        engine.come()
    engine.work(10)
    for _ in range(4):
        engine.go()
    for _ in range(20):  # one at a time, slowly
        engine.come()
        engine.now += 10
        engine.go()
    for _ in range(4):
        engine.come()
    assert engine.admission.expected_wait() == pytest.approx(0.5)


def test_the_memory_for_tokens_counts_too() -> None:
    engine = Engine(kv_tokens=100)
    for _ in range(4):
        engine.come()
    engine.work(10)  # 40 tokens a second
    for _ in range(4):
        engine.go()
    assert engine.come(prompt=45, allowed=0)
    assert engine.come(prompt=45, allowed=0)
    assert engine.admission.expected_wait(1, 10.0) == 0.0
    assert engine.admission.expected_wait(1, 20.0) == pytest.approx(10 / 40)


def test_more_than_the_most_is_refused_whatever_the_wait() -> None:
    admission = Admission(slots=4, most=6, max_wait=1e9)
    refused = pytest.raises(errors.ResourceExhausted, match="6 the most")
    with admission.admit(prompt=1, sequences=5), refused, admission.admit(prompt=1, sequences=2):
        pass
    assert admission.in_flight == 0


async def test_who_would_be_late_is_told_at_once() -> None:
    engine = Engine(max_wait=100.0)
    for _ in range(4):
        engine.come()
    engine.work(10)
    assert [engine.come() for _ in range(4)] == [True] * 4

    async def hasty() -> None:
        calls.enter(calls.Caller("a"), 1.0)
        assert not engine.come()
        late = pytest.raises(errors.ResourceExhausted, match=r"its turn in about 2\.5 s, after its deadline in")
        with late, engine.admission.admit(prompt=0, allowed=20):
            pass

    await asyncio.create_task(hasty())
    assert engine.come()


def test_calls_that_failed_teach_nothing() -> None:
    engine = Engine()
    engine.come()
    engine.go(None)
    assert engine.admission._share == 1.0
    assert engine.admission.in_flight == 0


def test_who_would_not_come_in_is_turned_away_before_anything_is_done() -> None:
    engine = Engine(max_wait=2.0)
    for _ in range(4):
        engine.come()
    engine.work(3)
    engine.admission.turn_away()
    while engine.come():
        pass
    with pytest.raises(errors.ResourceExhausted) as caught:
        engine.admission.turn_away()
    assert caught.value.retry_after > 0
    engine.now += 2.0
    for _ in range(4):
        engine.go()
    engine.admission.turn_away()
