"""Runs inside vLLM's engine process: how it waits for its workers (0.32)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

LONGEST_SLEEP_MS = 1


class RestingExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM has no types that we follow
    """Waits for a step's end asleep.

    vLLM's own looks again and again, for up to a second: a whole core, for as long as there is anything to do. On a CPU
    the workers compute meanwhile, and what hands out the tokens needs that core, or takes its time from the workers. To
    be woken costs some 50 µs of a step of 20 ms or more.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            condition = queue._spin_condition
            condition.busy_loop_s = 0.0
            # vLLM's notifications are dropped now and then: whoever sleeps for long may sleep on.
            condition.wait = partial(_wait, condition.wait)


def _wait(wait: Callable[..., None], timeout_ms: int | None = None) -> None:
    wait(timeout_ms=LONGEST_SLEEP_MS)
