"""The log: what every part of the wheel needs of Kafka, and no more.

Two implementations pass the same conformance suite: `kafka.KafkaLog` (any Kafka-protocol broker) and
`memory.MemoryLog` (tests). Calls block and are thread-safe only where said; `aio.py` adapts them to asyncio.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from thumbwheel import errors

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """Where the broker put a record."""

    topic: str
    partition: int
    offset: int


Outgoing = tuple[str, bytes, bytes, Headers]
"""A record to be sent: topic, key, value, headers."""

Outcome = Position | errors.ThumbwheelError
"""What became of a record that was sent."""


class Outcomes:
    """Gathers what becomes of `count` records, from any thread; `future` resolves with the last of them."""

    def __init__(self, count: int) -> None:
        self.future: Future[list[Outcome]] = Future()
        self.future.set_running_or_notify_cancel()
        self._outcomes: list[Outcome | None] = [None] * count
        self._left = count
        self._lock = threading.Lock()
        if not count:
            self.future.set_result([])

    def end(self, index: int, outcome: Outcome) -> None:
        """What became of one of them."""
        self._outcomes[index] = outcome
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self.future.set_result([outcome for outcome in self._outcomes if outcome is not None])


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read from the log. `timestamp` is in seconds since the epoch."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    headers: Headers = field(default=())
    timestamp: float = 0.0


class Producer(Protocol):
    """Writes records. Thread-safe. Records of one key stay in order."""

    def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
        """Queues a record and returns at once. The future resolves when the broker has acknowledged it (acks=all), or
        fails with `errors.Unavailable` after the delivery deadline, or with `errors.ResourceExhausted` when the queue
        is full.
        """
        ...

    def send_all(self, records: Sequence[Outgoing]) -> Future[list[Outcome]]:
        """As `send` of each in turn, at less cost. The future resolves when the last of them is acknowledged or has
        failed, and brings what became of each. It never fails.
        """
        ...

    def flush(self, timeout: float) -> None:
        """Waits until everything queued is acknowledged. Raises `errors.DeadlineExceeded`."""
        ...

    def close(self, timeout: float) -> None:
        """Flushes and stops."""
        ...


class Consumer(Protocol):
    """Reads all partitions of its topics from offsets that the caller keeps. For one thread at a time."""

    def poll(self, timeout: float, max_records: int = 500) -> Sequence[Record]:
        """Waits up to `timeout` seconds for records. Empty when there are none. In order within a partition.

        Where the position no longer exists (the log was truncated or lost), reading goes on from the oldest record
        there is: consumers drop what they have seen by id, so nothing is counted twice.
        """
        ...

    def positions(self) -> dict[TopicPartition, int]:
        """The offset of the next record of every partition. Keep them together with `topic_ids`."""
        ...

    def topic_ids(self) -> dict[str, str]:
        """The id of every topic that `positions` are offsets of. A topic that was lost and made anew has another."""
        ...

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Goes on reading from there. Partitions not named keep their position."""
        ...

    def end_offsets(self) -> dict[TopicPartition, int]:
        """One past the last offset of every partition, for lag. Raises `errors.Unavailable`."""
        ...

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tells the broker how far the group is, for lag monitoring only: nothing ever starts from it, so a failure is
        logged and counted, and not raised. May return before the broker knows.
        """
        ...

    def close(self) -> None:
        """Lets go of the connection."""
        ...


class Log(Protocol):
    """A broker."""

    def ensure_topics(self, topics: Iterable[Topic], timeout: float) -> None:
        """Creates those topics that do not exist, waiting for the broker where need be. Raises `errors.Unavailable`
        after `timeout` seconds.
        """
        ...

    def topic_ids(self, topics: Sequence[str], timeout: float) -> dict[str, str]:
        """The ids of those of the topics that exist, for `LossDetector.seen`. Raises `errors.Unavailable`."""
        ...

    def producer(self) -> Producer:
        """A new producer."""
        ...

    def consumer(
        self,
        topics: Sequence[str],
        *,
        group: str,
        start: Mapping[TopicPartition, int] | None = None,
        topic_ids: Mapping[str, str] | None = None,
    ) -> Consumer:
        """Reads all partitions of `topics`, from `start`, or from the oldest record where `start` says nothing.

        `topic_ids` are those kept with `start`: an offset of a topic that has another id by now belongs to a log that
        was lost, and reading begins at the oldest record instead.
        """
        ...

    def close(self) -> None:
        """Lets go of shared resources."""
        ...


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic and how it is to be created.

    `republished`: should the broker lose it, its one writer makes it anew and publishes everything again. Nobody else
    may make it: what was on its way to the lost one would then come before all that is older.
    """

    name: str
    partitions: int = 1
    replication: int = 1
    compacted: bool = False
    republished: bool = False


class LossDetector:
    """Notices that a log was lost (a memory-only broker restarted), so that its one writer publishes everything again.

    Two signs, each sufficient: a topic has another id than before, or a partition acknowledges an offset that is not
    above the last. Start it with the topic ids kept from the last run. Not thread-safe.
    """

    def __init__(self, topic_ids: Mapping[str, str] | None = None) -> None:
        self._topic_ids = dict(topic_ids or {})
        self._last: dict[TopicPartition, int] = {}

    @property
    def topic_ids(self) -> dict[str, str]:
        """The ids last seen, to be kept for the next run."""
        return dict(self._topic_ids)

    def seen(self, topic_ids: Mapping[str, str]) -> bool:
        """True where a topic's id is not the one seen before: all that it held is gone."""
        changed = {t for t, new in topic_ids.items() if self._topic_ids.get(t, new) != new}
        self._topic_ids.update(topic_ids)
        # The offsets of the lost log say nothing about the new one: one loss is reported once.
        self._last = {tp: offset for tp, offset in self._last.items() if tp.topic not in changed}
        return bool(changed)

    def acked(self, position: Position) -> bool:
        """True where the offset is not above the partition's last one. To be fed in the order of sending."""
        tp = TopicPartition(position.topic, position.partition)
        last = self._last.get(tp)
        self._last[tp] = position.offset
        return last is not None and position.offset <= last
