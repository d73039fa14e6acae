"""What the collector tells operators. Levels are read from the database when asked for, so they cannot drift."""

from __future__ import annotations

import logging
import time
from collections import Counter as CountBy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import Feedback, Preference, ThumbValue

logger = logging.getLogger(__name__)

FEEDBACK = Counter(
    "thumbwheel_collector_feedback_total", "Times that feedback came to stand in a state.", ["kind", "state"]
)
VERDICTS = Counter("thumbwheel_collector_verdicts_total", "What users said, each vote once.", ["kind", "verdict"])
# Made here, to be there from 0 on: else the first would be no increase.
_COMPARISONS = {
    value: VERDICTS.labels("comparison", name.removeprefix("PREFERENCE_").lower())
    for name, value in Preference.items()
    if value
}
_THUMBS = {
    value: VERDICTS.labels("thumb", name.removeprefix("THUMB_VALUE_").lower())
    for name, value in ThumbValue.items()
    if value
}
RECURATED = Counter(
    "thumbwheel_collector_recurated_total", "Times that feedback changed its state because its user's standing did."
)
DUPLICATES = Counter("thumbwheel_collector_duplicates_total", "Submissions that had been recorded before.")
REFUSED = Counter("thumbwheel_collector_refused_total", "Calls refused, by kind of error.", ["reason"])
COMMIT_SECONDS = Histogram(
    "thumbwheel_collector_commit_seconds",
    "Time from the check of feedback until it is durable.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15),
)
COMMIT_WRITES = Histogram(
    "thumbwheel_collector_commit_writes",
    "Pieces of feedback that were made durable together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)
GENERATIONS = Counter(
    "thumbwheel_collector_generations_total",
    "Generations taken from the stream that people were shown, repeats included.",
)
DEAD_LETTERS = Counter("thumbwheel_collector_dead_letters_total", "Records of the stream that could not be used.")
PUBLISHED = Counter("thumbwheel_collector_published_total", "Events that the broker acknowledged.", ["topic"])
PUBLISH_REFUSED = Counter(
    "thumbwheel_collector_publish_refused_total", "Events that the broker will never take.", ["topic"]
)
ERASURES = Counter("thumbwheel_collector_erasures_total", "Erasures finished: of users, and of what was too old.")
LOSSES = Counter("thumbwheel_collector_broker_losses_total", "Times that the broker had lost what it held.")


class Told(Protocol):
    """Feedback that came to stand in a state."""

    @property
    def kind(self) -> str:
        """What it is."""

    @property
    def state(self) -> str:
        """Where it stands."""


def told(changed: Iterable[Told]) -> None:
    """Counts feedback that came to stand in a state."""
    for (kind, state), count in CountBy((one.kind, one.state) for one in changed).items():
        FEEDBACK.labels(kind, state).inc(count)


def refused(error: Exception) -> None:
    """Counts a call, or a piece of feedback, that was refused."""
    REFUSED.labels(type(error).__name__).inc()


def said(feedback: Feedback) -> None:
    """Counts what a user said for the first time, where that is a verdict on whole responses."""
    match feedback.WhichOneof("kind"):
        case "thumb":
            _THUMBS[feedback.thumb.value].inc()
        case "comparison":
            _COMPARISONS[feedback.comparison.preference].inc()


class Levels(NamedTuple):
    """What is in the database now. `oldest` is in microseconds since the epoch: of what is acknowledged, since when the
    first event waits to be recorded or published; None where none does.
    """

    unpublished: int
    oldest: int | None
    held: int
    unrecorded: int


class LevelCollector(Collector):
    """Serves the levels of one database while it is open."""

    def __init__(self, read: Callable[[], Levels]) -> None:
        self._read = read

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The names, for registering without reading."""
        return (
            GaugeMetricFamily("thumbwheel_collector_outbox_depth", "Events committed and not published yet."),
            GaugeMetricFamily(
                "thumbwheel_collector_outbox_oldest_seconds", "Age of the oldest of them, or of what is in the inbox."
            ),
            GaugeMetricFamily("thumbwheel_collector_held", "Feedback waiting for its generations."),
            GaugeMetricFamily("thumbwheel_collector_inbox_depth", "Feedback acknowledged and not recorded yet."),
            GaugeMetricFamily("thumbwheel_collector_database_up", "1 where the database answered just now."),
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The levels; no more than that it is away where the database cannot be read now, so that the other metrics are
        still served.
        """
        *families, up = self.describe()
        try:
            levels = self._read()
        except errors.ThumbwheelError as error:
            logger.warning("levels not read", extra={"error": str(error)})
            up.add_metric([], 0.0)
            yield up
            return
        up.add_metric([], 1.0)
        yield up
        age = 0.0 if levels.oldest is None else max(0.0, time.time() - levels.oldest / 1e6)
        for family, value in zip(families, (levels.unpublished, age, levels.held, levels.unrecorded), strict=True):
            family.add_metric([], value)
            yield family

    def __enter__(self) -> LevelCollector:
        REGISTRY.register(self)
        return self

    def __exit__(self, *_: object) -> None:
        REGISTRY.unregister(self)
