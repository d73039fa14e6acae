"""The log: what every part of the wheel needs of Kafka, and no more.

Two implementations pass the same conformance suite: `kafka.KafkaLog` (any Kafka-protocol broker) and
`memory.MemoryLog` (tests). Calls block and are thread-safe only where said; `aio.py` adapts them to asyncio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
        """The offset of the next record of every partition."""
        ...

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Goes on reading from there. Partitions not named keep their position."""
        ...

    def end_offsets(self) -> dict[TopicPartition, int]:
        """One past the last offset of every partition, for lag."""
        ...

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tells the broker how far the group is, for lag monitoring only: nothing ever starts from it."""
        ...

    def close(self) -> None:
        """Lets go of the connection."""
        ...


class Log(Protocol):
    """A broker."""

    def ensure_topics(self, topics: Iterable[Topic], timeout: float) -> None:
        """Creates those topics that do not exist."""
        ...

    def producer(self) -> Producer:
        """A new producer."""
        ...

    def consumer(
        self, topics: Sequence[str], *, group: str, start: Mapping[TopicPartition, int] | None = None
    ) -> Consumer:
        """Reads all partitions of `topics`, from `start`, or from the oldest record where `start` says nothing."""
        ...

    def close(self) -> None:
        """Lets go of shared resources."""
        ...


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic and how it is to be created."""

    name: str
    partitions: int = 1
    replication: int = 1
    compacted: bool = False
