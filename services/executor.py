"""Runs inside vLLM's engine and worker processes on CPUs: how they wait for each other, and end (0.32)."""

from __future__ import annotations

import atexit
import gc
import time
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

BUSY_SECONDS = 1.0
BUSY_MS, IDLE_MS = 1, 20
"""Longest sleeps in the first second after something came, and later. Notifications are dropped now and then."""

_wait_for_notification = SpinCondition.wait


def adapt() -> None:
    """Has this process wait for the others asleep, and end without a last look for what could be freed.

    vLLM's own looks again and again, yielding, for a second after the last message: a whole core, for as long as there
    is anything to do. On a CPU others need that core: what computes meanwhile, what hands out the tokens, another
    engine. Where its workers did so, on Linux 6.18, others were seen to starve on their core for minutes. To be woken
    costs some 50 µs of a step of 20 ms or more.

    The last look takes a worker longer than vLLM lets it: it would be killed, five seconds later.
    """
    SpinCondition.wait = _wait
    atexit.register(gc.freeze)


def _wait(condition: Any, timeout_ms: int | None = None) -> None:
    busy = time.monotonic() < condition.last_read + BUSY_SECONDS
    longest = BUSY_MS if busy else IDLE_MS
    condition.busy_loop_s = 0.0
    _wait_for_notification(condition, timeout_ms=longest if timeout_ms is None else min(longest, timeout_ms))


class RestingExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM has no types that we follow
    """Waits for a step's end asleep. The workers do so from `SwapWorker.prepare` on."""

    def _init_executor(self) -> None:
        adapt()
        super()._init_executor()
