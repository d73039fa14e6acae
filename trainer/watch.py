"""What is seen of a task while it learns: metrics, logs, TensorBoard, and the guards that look at the same numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from thumbwheel import errors
from trainer import guards, metrics, progress
from trainer.board import Board
from trainer.config import TaskName, TrainerSettings
from trainer.samples import Sample
from trainer.staleness import sequence, staleness

if TYPE_CHECKING:
    from trainer.learner import StepReport

logger = logging.getLogger(__name__)

_LAG_SECONDS = 5.0


class Watch:
    """Watches one task."""

    def __init__(self, task: TaskName, settings: TrainerSettings) -> None:
        self._task, self._settings = task, settings
        self._board = Board(settings.home / "tensorboard" / task)
        self._next_lag = 0.0
        self.vitals: dict[str, float] = {}
        """The vital signs of the last round."""

    def step(self, report: StepReport, number: int) -> None:
        """A step was done, the `number`-th since the base model."""
        metrics.LOSS.labels(self._task).set(report.loss)
        for measure, value in report.measures.items():
            metrics.MEASURE.labels(self._task, measure).set(value)
        metrics.GRAD_NORM.labels(self._task).set(report.grad_norm)
        for phase, seconds in report.seconds.items():
            metrics.STEP_PHASE.labels(self._task, phase).observe(seconds)
        self._board.step(number, report.numbers())
        logger.info("step", extra={"task": self._task, **progress.fields(report)})

    def round(
        self,
        number: int,
        version: str,
        new: Sequence[Sample],
        lesson: Sequence[Sample],
        measured: dict[str, float],
        first: Mapping[str, float],
    ) -> None:
        """A round of `lesson`, of which `new` is learnt for the first time, was learnt from `version` on. Adds to what
        was `measured`. Raises `guards.Unfit` where it went wrong, compared with the `first`.
        """
        tokens = sum(sample.tokens for sample in lesson) * self._settings.epochs
        metrics.TOKENS_PER_SECOND.labels(self._task).set(tokens / measured["learn_seconds"])
        # What was imported may have been written by models that are not ours.
        ours = [one for one in new if one.versions and all(name.startswith("policy-") for name in one.versions)]
        ages = [staleness(sample, sequence(version)) for sample in ours] if self._task == "policy" else []
        for age in ages:
            metrics.STALENESS.labels(self._task).observe(age)
        if ages:
            measured["staleness"] = sum(ages) / len(ages)
        measured["added_samples"] = float(len(lesson) - len(new))
        self.vitals = guards.vitals(new, measured)
        for sign, value in self.vitals.items():
            metrics.VITAL.labels(self._task, sign).set(value)
            measured.setdefault(sign, value)
        self._board.round(number, measured)
        guards.check(self.vitals, first, self._settings)

    def lag(self, ask: Callable[[], Mapping[str, int]]) -> None:
        """Says how far the stream is ahead by topic, now and then."""
        if (now := time.monotonic()) < self._next_lag:
            return
        self._next_lag = now + _LAG_SECONDS
        try:
            for topic, records in ask().items():
                metrics.LAG.labels(self._task, topic).set(records)
        except errors.Unavailable as error:
            logger.warning("the lag is not known: %s", error, extra={"task": self._task})

    def close(self) -> None:
        """Writes what is left."""
        self._board.close()
