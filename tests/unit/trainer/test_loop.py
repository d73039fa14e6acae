"""The order of a round is what makes every sample count once."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from trainer import loop
from trainer.runtime import Stopped
from trainer.task import Task


class FakeTask:
    """Notes what it is asked to do."""

    def __init__(self, name: str, calls: list[str], stop: threading.Event, *, rounds: int, fail: str = "") -> None:
        self.name, self._calls, self._stop, self._rounds, self._fail = name, calls, stop, rounds, fail

    def __getattr__(self, verb: str) -> Any:
        def call(*arguments: object) -> list[str]:
            self._calls.append(f"{self.name}.{verb}")
            if verb == self._fail:
                raise Stopped
            return []

        return call

    def due(self) -> bool:
        """True for so many rounds; then it stops the loop."""
        self._rounds -= 1
        if self._rounds < 0:
            self._stop.set()
        return self._rounds >= 0


def run(*, rounds: int, fail: str = "", names: tuple[str, ...] = ("policy",)) -> tuple[list[str], list[bool]]:
    calls: list[str] = []
    ready: list[bool] = []
    stop = threading.Event()
    tasks = [FakeTask(name, calls, stop, rounds=rounds, fail=fail) for name in names]
    loop.run(cast(list[Task], tasks), stop, ready.append)
    return calls, ready


def test_checkpoint_comes_before_publish_and_offsets_come_last() -> None:
    calls, ready = run(rounds=1)
    verbs = ["resume", "ingest", "batch", "learn", "checkpoint", "publish", "commit", "ingest"]
    assert calls == [f"policy.{verb}" for verb in verbs]
    assert ready == [True, False]


def test_tasks_take_turns() -> None:
    calls, _ = run(rounds=1, names=("policy", "reward"))
    learning = [call for call in calls if call.endswith((".learn", ".commit"))]
    assert learning == ["policy.learn", "policy.commit", "reward.learn", "reward.commit"]


def test_a_round_that_is_stopped_leaves_no_checkpoint() -> None:
    calls, ready = run(rounds=1, fail="learn")
    assert calls[-1] == "policy.learn"
    assert ready == [True, False]


def test_another_error_ends_the_loop_and_it_is_not_ready_any_more() -> None:
    ready: list[bool] = []
    broken = FakeTask("policy", [], threading.Event(), rounds=1)
    broken.due = lambda: bool(1 / 0)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        loop.run(cast(list[Task], [broken]), threading.Event(), ready.append)
    assert ready == [True, False]
