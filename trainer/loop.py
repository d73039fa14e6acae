"""The loop: every piece of feedback is learnt from once, and what was learnt goes live.

    ingest ─▶ batch ─▶ learn ─▶ checkpoint ─▶ publish ─▶ commit
      ▲  waits for    │ written     │ begun      │           only tells the broker, for lag
      │  feedback and │ down        │            the version; then the rest of the checkpoint
      │  rollouts     │             │
      └───────────────┴─────────────┘

Tasks take turns. A crash before the checkpoint is finished learns the round again, from the very samples that were
written down, and comes to the version that is there, if it was published; one after it publishes what the checkpoint
stands for. All come out as if there had been none. What a guard finds unfit is not kept: the task halts, and the others
go on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from thumbwheel import tracing
from trainer import progress, runtime
from trainer.guards import Unfit
from trainer.task import Task

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


def run(tasks: Sequence[Task], stop: threading.Event, ready: Callable[[bool], None]) -> None:
    """Runs until `stop`. `ready` hears of the moment from which comparisons are learnt, and of the end."""
    for task in tasks:
        task.resume()
    ready(not stop.is_set())
    try:
        while not stop.is_set():
            for task in tasks:
                task.ingest(POLL_SECONDS / len(tasks))
                if task.due() and not stop.is_set():
                    turn(task)
    except runtime.Stopped:
        logger.info("stopped within a round: it is learnt at the next start")
    finally:
        ready(False)


def turn(task: Task) -> None:
    """A round of one task. Their order is what makes every sample count once."""
    samples = task.batch()
    learnt = [sample.traceparent for sample in samples]
    with tracing.span("trainer.round", links=learnt, task=task.name, samples=len(samples)):
        try:
            with progress.line(task.name) as on_step:
                measured = task.learn(samples, on_step)
        except Unfit as fault:
            task.halt(fault)
            return
        task.checkpoint(samples, measured)  # 1
        task.publish()  # 2
        task.commit()  # 3
