"""Reading from Kafka: all partitions of some topics, by hand, from positions that the caller keeps.

    poll ─▶ adopt   what the watch says: new partitions, topics that were lost and made anew
         ─▶ place   where a partition has no position yet, or one that does not exist: its oldest record
         ─▶ fetch

No group is joined and nothing starts from a committed offset.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge

from thumbwheel import errors
from thumbwheel.stream.kafka_client import MAX_MESSAGE_BYTES, client, kafka, longest_silence
from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.stream.kafka_watch import TopicState, Watch
from thumbwheel.stream.log import Record, TopicPartition

logger = logging.getLogger(__name__)

READ = Counter("thumbwheel_stream_records_read_total", "Records read.", ["topic", "group"])
LAG = Gauge("thumbwheel_stream_consumer_lag", "Records between the position and the end.", ["topic", "group"])
RENEWED = Counter("thumbwheel_stream_consumers_renewed_total", "Times that a new client took over from a silent one.")
LOSSES = Counter(
    "thumbwheel_stream_log_losses_total", "Times a topic was found lost and made anew.", ["topic", "group"]
)

_FETCH_WAIT_SECONDS = 0.1  # how late a record may be seen on a broker that answers waiting fetches only in the end
_BEYOND_SECONDS = 1.5
_SETTLE_SECONDS = 2.0
_CLOSE_SECONDS = 1.0


class KafkaLogConsumer:
    """A `Consumer`. While the broker is away, `poll` finds nothing; it goes on when the broker is back."""

    def __init__(
        self,
        configs: dict[str, Any],
        watch: Watch,
        topics: Sequence[str],
        *,
        group: str,
        start: Mapping[TopicPartition, int],
        topic_ids: Mapping[str, str],
    ) -> None:
        self._configs = configs
        self._watch = watch
        self._topics = list(topics)
        self._group = group
        self._positions = {TopicPartition(*tp): offset for tp, offset in start.items() if tp[0] in topics}
        self._topic_ids = {name: id for name, id in topic_ids.items() if name in topics}
        self._assigned: set[TopicPartition] = set()
        self._unplaced: set[TopicPartition] = set()
        self._beyond: dict[TopicPartition, float] = {}  # since when a position has been past the end
        self._seen: Mapping[str, TopicState] = {}
        self._client: Any = None
        self._silence = 0.0  # for how long the client has waited in vain to hear anything
        self._closed = False
        watch.follow(topics)

    def poll(self, timeout: float, max_records: int = 500) -> Sequence[Record]:
        """See `Consumer.poll`. Raises `errors.PermissionDenied`, and `errors.Internal` for a batch that is corrupt."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            if self._ready(left):
                batch = self._take(self._fetch(max(deadline - time.monotonic(), 0.0), max_records))
                self._listen()
                if batch:
                    return batch
            if time.monotonic() >= deadline:
                return []

    def positions(self) -> dict[TopicPartition, int]:
        """See `Consumer.positions`. Waits up to two seconds for a broker that has not said yet where partitions begin;
        those it has not said are left out.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self._settled() and time.monotonic() < deadline:
            self._ready(deadline - time.monotonic())
        return {tp: offset for tp, offset in self._positions.items() if tp in self._assigned}

    def topic_ids(self) -> dict[str, str]:
        """See `Consumer.topic_ids`."""
        return dict(self._topic_ids)

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Consumer.seek`."""
        for tp, offset in positions.items():
            self._positions[TopicPartition(*tp)] = offset
            self._unplaced.add(TopicPartition(*tp))
        self._drop_client()  # with what it knows of where the partitions ended when they were last read

    def end_offsets(self) -> dict[TopicPartition, int]:
        """See `Consumer.end_offsets`."""
        try:
            if not self._ready(_SETTLE_SECONDS):
                raise kafka_errors.KafkaTimeoutError(f"no answer within {_SETTLE_SECONDS:g} s")
            return self._ends()
        except kafka_errors.KafkaError as error:
            raise errors.Unavailable(
                f"The broker does not say where partitions end: {error}.",
                remedy=f"Check that one runs at {','.join(self._configs['bootstrap_servers'])}.",
            ) from error

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """See `Consumer.commit`. Returns at once; a commit that fails is logged and counted, and no harm."""
        self._watch.commit(self._group, positions)

    def close(self) -> None:
        """See `Consumer.close`."""
        self._closed = True
        self._drop_client()

    def _settled(self) -> bool:
        return all(name in self._seen for name in self._topics) and not self._unplaced & self._assigned

    def _ready(self, timeout: float) -> bool:
        """Whether there is something to fetch from; waits for that up to `timeout` seconds."""
        if self._closed:
            raise errors.FailedPrecondition("The consumer is closed.", remedy="Make another one.")
        deadline = time.monotonic() + timeout
        self._adopt()
        if not self._assigned:
            self._watch.await_change(self._seen, timeout)
            return False
        try:
            if self._client is None:
                self._connect()
            if self._unplaced:
                self._place()
        except (kafka_errors.KafkaError, OSError) as error:
            if isinstance(error, kafka_errors.AuthorizationError):
                raise errors.PermissionDenied(f"{', '.join(self._topics)} may not be read: {error}.") from error
            # The broker is away. A change of the topics is how its return as another shows; else the time passes.
            self._watch.await_change(self._seen, min(max(deadline - time.monotonic(), 0.0), _FETCH_WAIT_SECONDS))
            return False
        return True

    def _adopt(self) -> None:
        there = self._watch.topics()
        if there is self._seen:
            return
        self._seen = there
        for name in self._topics:
            if name not in there:
                continue  # not made yet, or lost and not made anew yet
            if self._topic_ids.setdefault(name, there[name].id) != there[name].id:
                logger.warning("the topic was lost and made anew: reading it from its beginning", extra={"topic": name})
                LOSSES.labels(name, self._group).inc()
                self._topic_ids[name] = there[name].id
                self._positions = {tp: offset for tp, offset in self._positions.items() if tp.topic != name}
                self._assigned = {tp for tp in self._assigned if tp.topic != name}
                self._unplaced = {tp for tp in self._unplaced if tp.topic != name}
                self._drop_client()  # with what it has fetched of the lost log
            partitions = {TopicPartition(name, number) for number in range(there[name].partitions)}
            if not self._assigned.issuperset(partitions):
                self._unplaced |= partitions - self._assigned
                self._assigned |= partitions
                self._drop_client()

    def _connect(self) -> None:
        self._client = self._reader()
        for tp in self._assigned - self._unplaced:
            self._client.seek(kafka.TopicPartition(*tp), self._positions[tp])

    def _reader(self) -> Any:
        reader = client(
            kafka.KafkaConsumer,
            **self._configs,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            metrics_enabled=False,
            fetch_max_wait_ms=int(_FETCH_WAIT_SECONDS * 1000),
            max_partition_fetch_bytes=2 * MAX_MESSAGE_BYTES,
        )
        reader.assign([kafka.TopicPartition(*tp) for tp in self._assigned])
        return reader

    def _place(self) -> None:
        """Seeks to the positions that are new, or to the oldest record. Positions past the end show when fetching."""
        placing = [kafka.TopicPartition(*tp) for tp in self._unplaced & self._assigned]
        begins = offsets_of(self._client.beginning_offsets, placing)
        for partition, begin in begins.items():
            tp = TopicPartition(*partition)
            self._positions[tp] = max(self._positions.get(tp, begin), begin)
            self._client.seek(partition, self._positions[tp])
            self._unplaced.discard(tp)

    def _ends(self) -> dict[TopicPartition, int]:
        """Asks a reader of its own, as a fetch tells: not all brokers list the offset after a batch of many records."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        reader = self._reader()
        try:
            ends = offsets_of(reader.end_offsets, reader.assignment())
            for partition, end in ends.items():
                reader.seek(partition, end)
            while None in (told := [reader.highwater(partition) for partition in ends]):
                if time.monotonic() > deadline:
                    raise kafka_errors.KafkaTimeoutError(f"no answer within {_SETTLE_SECONDS:g} s")
                reader.poll(timeout_ms=int(_FETCH_WAIT_SECONDS * 1000))
            return {TopicPartition(*partition): end for partition, end in zip(ends, told, strict=True)}
        finally:
            reader.close(autocommit=False)

    def _take(self, fetched: Mapping[Any, Sequence[Any]]) -> list[Record]:
        batch = [
            Record(
                r.topic,
                r.partition,
                r.offset,
                r.key or b"",
                r.value or b"",
                tuple((name, content or b"") for name, content in r.headers or ()),
                r.timestamp / 1000,
            )
            for records in fetched.values()
            for r in records
        ]
        for record in batch:
            self._positions[TopicPartition(record.topic, record.partition)] = record.offset + 1
            READ.labels(record.topic, self._group).inc()
        self._measure()
        return batch

    def _measure(self) -> None:
        """Sets the lag. Goes back to the oldest record where a partition ends before the position."""
        lag = dict.fromkeys(self._topics, 0)
        for tp in self._assigned:
            end = self._client.highwater(kafka.TopicPartition(*tp))
            if end is None or end >= self._positions[tp]:
                self._beyond.pop(tp, None)
            # For a moment a new leader may not know yet how far its predecessor was read.
            elif time.monotonic() - self._beyond.setdefault(tp, time.monotonic()) > _BEYOND_SECONDS:
                logger.warning(
                    "the position does not exist: reading from the oldest record",
                    extra={"topic": tp.topic, "partition": tp.partition, "position": self._positions.pop(tp)},
                )
                self._unplaced.add(tp)
                del self._beyond[tp]
                continue
            lag[tp.topic] += max((end or 0) - self._positions[tp], 0)
        for name, records in lag.items():
            LAG.labels(name, self._group).set(records)

    def _fetch(self, timeout: float, max_records: int) -> Mapping[Any, Sequence[Any]]:
        began, heard = time.monotonic(), self._client._client.heard_at()
        try:
            fetched: Mapping[Any, Sequence[Any]] = self._client.poll(
                timeout_ms=int(timeout * 1000), max_records=max_records
            )
        except kafka_errors.AuthorizationError as error:
            raise errors.PermissionDenied(f"{', '.join(self._topics)} may not be read: {error}.") from error
        except kafka_errors.KafkaError as error:
            if error.retriable or isinstance(error, kafka_errors.KafkaTimeoutError | kafka_errors.NodeNotReadyError):
                return {}
            raise errors.Internal(f"Reading {', '.join(self._topics)} failed at {self._positions}: {error}.") from error
        finally:
            # A broker says also that there is nothing.
            self._silence = 0.0 if self._client._client.heard_at() > heard else self._silence + time.monotonic() - began
        return fetched

    def _listen(self) -> None:
        """Gives up a client that has waited in vain for too long while brokers answered others: after a network that
        swallowed its requests, one may wait for ever.
        """
        silent = self._watch.answering_seconds(time.monotonic() - self._silence)
        if silent > longest_silence(self._configs):
            logger.warning("a new client takes over: it has heard nothing", extra={"seconds": round(silent, 1)})
            RENEWED.inc()
            self._drop_client()

    def _drop_client(self) -> None:
        self._silence = 0.0
        dropped, self._client = self._client, None
        if dropped is not None:
            dropped.close(autocommit=False, timeout_ms=int(_CLOSE_SECONDS * 1000))


def offsets_of(ask: Callable[..., dict[Any, int]], partitions: Collection[Any]) -> dict[Any, int]:
    """What kafka-python says of these partitions. Raises its `UnknownTopicOrPartitionError` where the broker knows only
    some of them, as one does whose topics are being made anew; kafka-python then raises `KeyError`.
    """
    try:
        return ask(partitions, timeout_ms=int(_SETTLE_SECONDS * 1000))
    except KeyError as error:
        raise kafka_errors.UnknownTopicOrPartitionError(f"{error} is not there") from error
