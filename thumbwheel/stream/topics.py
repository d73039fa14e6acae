"""The topics: `thumbwheel.<name>.v1`. What travels on each is in `proto/thumbwheel/v1/events.proto`."""

from __future__ import annotations

from thumbwheel.stream.log import Topic

GENERATIONS = "thumbwheel.generations.v1"
FEEDBACK = "thumbwheel.feedback.v1"
COMPARISONS = "thumbwheel.comparisons.v1"
THUMBS = "thumbwheel.thumbs.v1"
VERSIONS = "thumbwheel.versions.v1"
DEADLETTER = "thumbwheel.deadletter.v1"


def topics(*, partitions: int, replication: int) -> tuple[Topic, ...]:
    """All topics. Keys keep the order within a prompt, so more partitions are safe."""
    return (
        Topic(GENERATIONS, partitions, replication),
        Topic(FEEDBACK, partitions, replication, republished=True),
        Topic(COMPARISONS, partitions, replication, republished=True),
        Topic(THUMBS, partitions, replication, republished=True),
        Topic(VERSIONS, 1, replication, compacted=True),
        Topic(DEADLETTER, 1, replication),
    )
