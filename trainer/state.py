"""How far a task is, as it lies in a training checkpoint, and what it would go on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thumbwheel.checkpoints.store import SAMPLES, LocalStore
from thumbwheel.stream.log import TopicPartition
from thumbwheel.v1.rollout_pb2 import ModelRole, OffsetRange
from trainer.config import TaskName
from trainer.samples import Sample


@dataclass(frozen=True)
class State:
    """How far a task is, as of its newest training checkpoint."""

    round: int
    steps: int
    version: str
    """The version that the weights are, or are to be published as."""
    positions: dict[TopicPartition, int]
    topic_ids: dict[str, str]
    vitals: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the guards compare with: the vital signs of the first round that showed them."""
    start: str = ""
    """The version that the learner began from, whose weights the frozen ones are; where none is said, the base."""

    def to_json(self) -> str:
        """As it lies in a checkpoint."""
        fields = dataclasses.asdict(self)
        fields["positions"] = [[*tp, offset] for tp, offset in sorted(self.positions.items())]
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> State:
        """Reads `to_json`."""
        fields = json.loads(text)
        fields["positions"] = {TopicPartition(topic, part): offset for topic, part, offset in fields["positions"]}
        return cls(**fields)


@dataclass(frozen=True)
class Outlook:
    """What a task would go on with."""

    task: TaskName
    objective: str
    base: str
    version: str
    """The version that it goes on from."""
    round: int
    steps: int
    checkpoint: Path | None
    waiting: Sequence[Sample]
    due: bool
    """Whether a round would start at once."""
    prompts: int
    """Prompts that could be answered."""
    replayable: int
    demonstrations: int
    retracted: tuple[str, ...]
    """What was learnt and is now retracted."""


def ranges(before: State, after: State) -> list[OffsetRange]:
    """What was consumed between two states. A topic that was lost in between was consumed from its beginning."""
    ranges = []
    for tp, end in sorted(after.positions.items()):
        start = before.positions.get(tp, 0)
        same = before.topic_ids.get(tp.topic) == after.topic_ids.get(tp.topic)
        ranges.append(
            OffsetRange(topic=tp.topic, partition=tp.partition, start=start if same and start <= end else 0, end=end)
        )
    return ranges


def begin(store: LocalStore, role: ModelRole.ValueType) -> tuple[State, list[str]]:
    """The state where there is no training checkpoint: that of the newest version in the store. Also the ids of what
    the versions there learnt from: that is not learnt again.
    """
    versions = store.versions(role)
    learnt = [
        sample_id
        for manifest in versions
        if manifest.sequence
        for sample_id in store.read(manifest.version, SAMPLES).decode().split()
    ]
    newest = versions[0]
    return State(0, newest.lineage.steps, newest.version, {}, {}, start=newest.version), learnt


def published_as(store: LocalStore, role: ModelRole.ValueType, before: State, sample_ids: Sequence[str]) -> str:
    """What a round that led on from `before` and learnt from these samples was published as; "" where it was not."""
    newest = store.latest(role)
    if newest is None or not newest.sequence or newest.parent != before.version:
        return ""
    learnt = store.read(newest.version, SAMPLES).decode().split()
    return newest.version if learnt == sorted(sample_ids) else ""
