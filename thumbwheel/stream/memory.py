"""A log in memory, for tests: the same promises as Kafka, and hooks for what can befall a broker.

`stop` and `start` take the broker away and bring it back, `lose` is the restart of a broker that keeps nothing on disk,
`truncate` is retention.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from uuid_utils import uuid4

from thumbwheel import errors
from thumbwheel.stream.log import (
    Headers,
    Outcome,
    Outcomes,
    Outgoing,
    Position,
    Record,
    Topic,
    TopicPartition,
)

AWAY = "The broker is away."


@dataclass(slots=True)
class _Partition:
    base: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.base + len(self.records)


@dataclass(slots=True)
class _Topic:
    partitions: list[_Partition]
    id: str = field(default_factory=lambda: str(uuid4()))


@dataclass(slots=True)
class _Pending:
    future: Future[Position]
    deadline: float
    topic: str
    key: bytes
    value: bytes
    headers: Headers


class MemoryLog:
    """A `Log` in memory. Thread-safe.

    While the broker is stopped, at most `queue_size` records wait; each fails after `delivery_timeout` seconds.
    """

    def __init__(self, *, queue_size: int = 10_000, delivery_timeout: float = 30.0) -> None:
        self._queue_size = queue_size
        self._delivery_timeout = delivery_timeout
        self._changed = threading.Condition()
        self._topics: dict[str, _Topic] = {}
        self._pending: deque[_Pending] = deque()
        self._away = False
        self._expiry: threading.Thread | None = None
        self._committed: dict[str, dict[TopicPartition, int]] = {}

    def ensure_topics(self, topics: Iterable[Topic], timeout: float) -> None:
        """See `Log.ensure_topics`."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._away, timeout):
                raise errors.Unavailable(AWAY)
            for topic in topics:
                self._topics.setdefault(topic.name, _Topic([_Partition() for _ in range(topic.partitions)]))
            self._changed.notify_all()

    def topic_ids(self, topics: Sequence[str], timeout: float) -> dict[str, str]:
        """See `Log.topic_ids`."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._away, timeout):
                raise errors.Unavailable(AWAY)
            return {name: self._topics[name].id for name in topics if name in self._topics}

    def producer(self) -> MemoryProducer:
        """See `Log.producer`."""
        return MemoryProducer(self)

    def consumer(
        self,
        topics: Sequence[str],
        *,
        group: str,
        start: Mapping[TopicPartition, int] | None = None,
        topic_ids: Mapping[str, str] | None = None,
    ) -> MemoryConsumer:
        """See `Log.consumer`."""
        return MemoryConsumer(self, topics, group, start or {}, topic_ids or {})

    def close(self) -> None:
        """Ends what is still waiting for a stopped broker."""
        self.start()

    # What can befall a broker.

    def stop(self) -> None:
        """Takes the broker away: writes wait, reads find nothing."""
        with self._changed:
            if self._away:
                return
            self._away = True
            self._expiry = threading.Thread(target=self._expire, name="memory-log-deadlines", daemon=True)
            self._expiry.start()

    def start(self) -> None:
        """Brings the broker back; what waited is written in the order in which it was sent."""
        with self._changed:
            self._away = False
            pending, self._pending = list(self._pending), deque()
            done = [(p, self._append(p)) for p in pending]
            expiry, self._expiry = self._expiry, None
            self._changed.notify_all()
        for waiting, position in done:
            _resolve(waiting, position)
        if expiry is not None:
            expiry.join()

    def lose(self) -> None:
        """Loses every record, as when a memory-only broker restarts: offsets begin at 0, topics have new ids."""
        with self._changed:
            self._topics = {
                name: _Topic([_Partition() for _ in topic.partitions]) for name, topic in self._topics.items()
            }
            self._committed = {}
            self._changed.notify_all()

    def truncate(self, before: Mapping[TopicPartition, int]) -> None:
        """Drops the records before these offsets, as retention does."""
        with self._changed:
            for tp, offset in before.items():
                partition = self._topics[tp.topic].partitions[tp.partition]
                dropped = min(max(offset - partition.base, 0), len(partition.records))
                del partition.records[:dropped]
                partition.base += dropped

    # What tests look at.

    def records(self, topic: str) -> list[Record]:
        """All records of a topic, by partition and offset."""
        with self._changed:
            return [r for p in self._topics[topic].partitions for r in p.records] if topic in self._topics else []

    def committed(self, group: str) -> dict[TopicPartition, int]:
        """What a group has committed."""
        with self._changed:
            return dict(self._committed.get(group, {}))

    # For the producers and consumers of this module.

    def _send(self, topic: str, key: bytes, value: bytes, headers: Headers) -> Future[Position]:
        waiting = _Pending(Future(), time.monotonic() + self._delivery_timeout, topic, key, value, headers)
        waiting.future.set_running_or_notify_cancel()  # a record that was sent cannot be called back
        with self._changed:
            if self._away and len(self._pending) >= self._queue_size:
                full = errors.ResourceExhausted("The queue of the stream is full.", retry_after=1.0)
                waiting.future.set_exception(full)
                return waiting.future
            if self._away:
                self._pending.append(waiting)
                self._changed.notify_all()
                return waiting.future
            position = self._append(waiting)
            self._changed.notify_all()
        # Outside the lock: the callbacks of the future run here and may call this log.
        _resolve(waiting, position)
        return waiting.future

    def _append(self, waiting: _Pending) -> Position | None:
        topic = self._topics.get(waiting.topic)
        if topic is None:
            return None
        number = zlib.crc32(waiting.key) % len(topic.partitions)
        partition = topic.partitions[number]
        position = Position(waiting.topic, number, partition.end)
        partition.records.append(Record(*position, waiting.key, waiting.value, tuple(waiting.headers), time.time()))
        return position

    def _expire(self) -> None:
        """Fails what has waited too long; lives while the broker is away."""
        while True:
            with self._changed:
                if not self._away:
                    return
                now = time.monotonic()
                late = []
                while self._pending and self._pending[0].deadline <= now:
                    late.append(self._pending.popleft())
                if not late:
                    self._changed.wait(self._pending[0].deadline - now if self._pending else None)
            for waiting in late:
                waiting.future.set_exception(
                    errors.Unavailable(f"{AWAY} {waiting.topic}: record not delivered in time.")
                )


def _resolve(waiting: _Pending, position: Position | None) -> None:
    if position is None:
        waiting.future.set_exception(errors.Unavailable(f"There is no topic {waiting.topic}."))
    else:
        waiting.future.set_result(position)


class MemoryProducer:
    """A `Producer` of a `MemoryLog`."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._unfinished: set[Future[Position]] = set()
        self._lock = threading.Condition()
        self._closed = False

    def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
        """See `Producer.send`."""
        if self._closed:
            raise errors.FailedPrecondition("The producer is closed.")
        future = self._log._send(topic, key, value, headers)
        with self._lock:
            self._unfinished.add(future)
        future.add_done_callback(self._finished)
        return future

    def send_all(self, records: Sequence[Outgoing]) -> Future[list[Outcome]]:
        """See `Producer.send_all`."""
        outcomes = Outcomes(len(records))
        for i, (topic, key, value, headers) in enumerate(records):
            self.send(topic, key, value, headers).add_done_callback(partial(_end, outcomes, i))
        return outcomes.future

    def flush(self, timeout: float) -> None:
        """See `Producer.flush`."""
        with self._lock:
            if not self._lock.wait_for(lambda: not self._unfinished, timeout):
                raise errors.DeadlineExceeded(f"{len(self._unfinished)} records not acknowledged in {timeout:g} s.")

    def close(self, timeout: float) -> None:
        """See `Producer.close`."""
        self._closed = True
        self.flush(timeout)

    def _finished(self, future: Future[Position]) -> None:
        with self._lock:
            self._unfinished.discard(future)
            self._lock.notify_all()


def _end(outcomes: Outcomes, index: int, future: Future[Position]) -> None:
    error = future.exception()
    if error is None:
        outcomes.end(index, future.result())
        return
    assert isinstance(error, errors.ThumbwheelError)
    outcomes.end(index, error)


class MemoryConsumer:
    """A `Consumer` of a `MemoryLog`."""

    def __init__(
        self,
        log: MemoryLog,
        topics: Sequence[str],
        group: str,
        start: Mapping[TopicPartition, int],
        topic_ids: Mapping[str, str],
    ) -> None:
        self._log = log
        self._topics = list(topics)
        self._group = group
        self._positions = {tp: offset for tp, offset in start.items() if tp.topic in topics}
        self._ids = {name: id for name, id in topic_ids.items() if name in topics}
        self._turn = 0
        self._closed = False
        self.positions()

    def poll(self, timeout: float, max_records: int = 500) -> Sequence[Record]:
        """See `Consumer.poll`."""
        deadline = time.monotonic() + timeout
        with self._log._changed:
            while True:
                self._check_open()
                batch = [] if self._log._away else self._take(max_records)
                left = deadline - time.monotonic()
                if batch or left <= 0:
                    return batch
                self._log._changed.wait(left)

    def positions(self) -> dict[TopicPartition, int]:
        """See `Consumer.positions`."""
        with self._log._changed:
            self._refresh()
            return dict(self._positions)

    def topic_ids(self) -> dict[str, str]:
        """See `Consumer.topic_ids`."""
        # Not refreshed: the ids belong to the positions last given.
        with self._log._changed:
            return dict(self._ids)

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Consumer.seek`."""
        with self._log._changed:
            self._refresh()
            self._positions.update(positions)
            self._log._changed.notify_all()

    def end_offsets(self) -> dict[TopicPartition, int]:
        """See `Consumer.end_offsets`."""
        with self._log._changed:
            if self._log._away:
                raise errors.Unavailable(AWAY)
            return {tp: partition.end for tp, partition in self._partitions()}

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Consumer.commit`."""
        with self._log._changed:
            if not self._log._away:
                self._log._committed.setdefault(self._group, {}).update(positions)

    def close(self) -> None:
        """See `Consumer.close`."""
        with self._log._changed:
            self._closed = True
            self._log._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise errors.FailedPrecondition("The consumer is closed.")

    def _partitions(self) -> list[tuple[TopicPartition, _Partition]]:
        return [
            (TopicPartition(name, number), partition)
            for name in self._topics
            if name in self._log._topics
            for number, partition in enumerate(self._log._topics[name].partitions)
        ]

    def _refresh(self) -> None:
        """Takes in new partitions; goes back to the oldest record where the log was lost or truncated."""
        if self._log._away:
            return
        for name in self._topics:
            topic = self._log._topics.get(name)
            if topic is not None and self._ids.setdefault(name, topic.id) != topic.id:
                self._ids[name] = topic.id
                self._positions = {tp: offset for tp, offset in self._positions.items() if tp.topic != name}
        for tp, partition in self._partitions():
            if not partition.base <= self._positions.get(tp, -1) <= partition.end:
                self._positions[tp] = partition.base

    def _take(self, max_records: int) -> list[Record]:
        self._refresh()
        partitions = self._partitions()
        batch: list[Record] = []
        # A busy partition does not keep the others waiting: each poll begins at the next one.
        self._turn += 1
        for i in range(len(partitions)):
            tp, partition = partitions[(self._turn + i) % len(partitions)]
            first = self._positions[tp] - partition.base
            taken = partition.records[first : first + max_records - len(batch)]
            self._positions[tp] += len(taken)
            batch += taken
        return batch
