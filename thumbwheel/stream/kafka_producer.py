"""Writing to Kafka: a queue, and a thread that hands records to kafka-python and deals with what becomes of them.

    send ──▶ queue by topic ──thread──▶ KafkaProducer ──▶ acknowledged: the future resolves
                  ▲                          │
                  └── in order, new client ──┴── not: the topic is gone, the broker forgot our producer id, ...

kafka-python's idempotent producer is finished for good once a broker does not know its id any more, and takes a
duplicate sequence number for success though a broker that lost its log may mean another's record. So whatever fails for
another reason than the record itself is sent again through a new client, until its deadline: at least once, and in
order among what was not acknowledged. So is what a client says nothing of though the brokers answer: after a network
that swallowed its requests, one may wait for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter as Count
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client import Counter

from thumbwheel import errors
from thumbwheel.stream.kafka_client import MAX_MESSAGE_BYTES, client, kafka, longest_silence
from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.stream.kafka_watch import TopicState, Watch
from thumbwheel.stream.log import Headers, Outcome, Outcomes, Outgoing, Position

logger = logging.getLogger(__name__)

SENT = Counter("thumbwheel_stream_records_sent_total", "Records that were to be written.", ["topic"])
ACKED = Counter("thumbwheel_stream_records_acked_total", "Records that a broker acknowledged.", ["topic"])
FAILED = Counter("thumbwheel_stream_records_failed_total", "Records given back to the sender.", ["topic", "reason"])
RENEWED = Counter("thumbwheel_stream_producers_renewed_total", "Times that a new producer took over from a failed one.")

_OVERHEAD_BYTES = 512  # of a batch of one record, and the framing of its headers
_HAND_OVER = 500  # records between two looks at the deadlines
_TICK_SECONDS = 0.05
_RENEW_SECONDS = 0.2
_DRAIN_SECONDS = 2.0
_METADATA_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class _Pending:
    number: int
    deadline: float
    topic: str
    key: bytes
    value: bytes
    headers: Headers
    size: int
    end: Callable[[int, Outcome], None]
    index: int


class KafkaLogProducer:
    """A `Producer` that never blocks its callers. At most `queue_records` and `queue_bytes` wait at a time."""

    def __init__(
        self,
        configs: dict[str, Any],
        watch: Watch,
        *,
        delivery_timeout: float,
        queue_records: int,
        queue_bytes: int,
    ) -> None:
        self._configs = configs
        self._watch = watch
        self._delivery_timeout = delivery_timeout
        self._queue_records = queue_records
        self._queue_bytes = queue_bytes
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for the thread: there is something to do
        self._ended = threading.Condition(self._lock)  # for `flush`: a record is finished
        self._unfinished: dict[int, _Pending] = {}  # by number, so the oldest is first
        self._bytes = 0
        self._numbers = 0
        self._queues: dict[str, deque[_Pending]] = {}
        self._handed: dict[int, _Pending] = {}
        self._heard = 0.0  # when the client was last given something to speak of, or spoke
        self._acks: Count[str] = Count()  # of each topic, not counted as metrics yet
        self._failure = ""  # why the client is not used any more
        self._last_error = "no answer"
        self._closed = self._stopped = False
        self._client: Any = None
        self._known: dict[str, TopicState] = {}  # the topics as they were when the client first met them
        self._thread = threading.Thread(target=self._run, name="stream-producer", daemon=True)
        self._thread.start()

    def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
        """See `Producer.send`. A record larger than 2 MiB fails with `errors.InvalidArgument`."""
        future: Future[Position] = Future()
        future.set_running_or_notify_cancel()  # a record that was sent cannot be called back
        self._enqueue([(topic, key, value, headers)], partial(_resolve, future))
        return future

    def send_all(self, records: Sequence[Outgoing]) -> Future[list[Outcome]]:
        """See `Producer.send_all`."""
        outcomes = Outcomes(len(records))
        self._enqueue(records, outcomes.end)
        return outcomes.future

    def _enqueue(self, records: Sequence[Outgoing], end: Callable[[int, Outcome], None]) -> None:
        deadline = time.monotonic() + self._delivery_timeout
        refused: list[tuple[int, errors.ThumbwheelError]] = []
        with self._changed:
            if self._closed:
                raise errors.FailedPrecondition("The producer is closed.", remedy="Make another one.")
            for topic, count in Count(record[0] for record in records).items():
                SENT.labels(topic).inc(count)
            for i, (topic, key, value, headers) in enumerate(records):
                size = len(key) + len(value) + sum(len(name) + len(it) for name, it in headers) + _OVERHEAD_BYTES
                refusal = self._refuse(size)
                if refusal is not None:
                    FAILED.labels(topic, type(refusal).__name__).inc()
                    refused.append((i, refusal))
                    continue
                self._numbers += 1
                pending = _Pending(self._numbers, deadline, topic, key, value, headers, size, end, i)
                self._unfinished[pending.number] = pending
                self._bytes += size
                self._queues.setdefault(topic, deque()).append(pending)
            self._changed.notify_all()
        for i, refusal in refused:
            end(i, refusal)

    def _refuse(self, size: int) -> errors.ThumbwheelError | None:
        if size > MAX_MESSAGE_BYTES:
            return errors.InvalidArgument(
                f"A record of {size} bytes is larger than {MAX_MESSAGE_BYTES}.", field="value"
            )
        if len(self._unfinished) >= self._queue_records or self._bytes + size > self._queue_bytes:
            return errors.ResourceExhausted(
                f"{len(self._unfinished)} records ({self._bytes} bytes) wait for the broker already.",
                retry_after=1.0,
                remedy="Send less, or check the broker.",
            )
        return None

    def flush(self, timeout: float) -> None:
        """See `Producer.flush`."""
        with self._changed:
            last = self._numbers
            done = self._ended.wait_for(lambda: next(iter(self._unfinished), last + 1) > last, timeout)
            left = len(self._unfinished)
        self._count()
        if not done:
            raise errors.DeadlineExceeded(
                f"{left} records were not acknowledged within {timeout:g} s: {self._last_error}."
            )

    def close(self, timeout: float) -> None:
        """See `Producer.close`. What is not acknowledged in time fails with `errors.Unavailable`."""
        with self._changed:
            self._closed = True
        deadline = time.monotonic() + timeout
        try:
            self.flush(timeout)
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            self._thread.join(max(deadline - time.monotonic(), 0.0) + 2 * _DRAIN_SECONDS)

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._count()
                self._expire()
                self._listen()
                if self._failure:
                    self._renew()
                if not self._hand_over():
                    with self._changed:
                        # New records, failures and the end are notified; deadlines and the broker's return are not.
                        if not self._stopped:
                            self._changed.wait(_TICK_SECONDS if self._unfinished or self._acks else None)
        except BaseException as error:
            self._last_error = f"the producer's thread ended: {error!r}"
            logger.exception("the producer's thread ended")
            raise
        finally:
            self._closed = True
            self._count()
            self._drop_client(drain=0.0)  # `close` has waited for as long as it was to
            for pending in list(self._unfinished.values()):
                self._finish(pending, errors.Unavailable(f"The producer was closed: {self._last_error}."))

    def _expire(self) -> None:
        now = time.monotonic()
        while True:
            with self._changed:
                oldest = next(iter(self._unfinished.values()), None)
            if oldest is None or oldest.deadline > now:
                return
            self._finish(
                oldest,
                errors.Unavailable(
                    f"{oldest.topic}: not acknowledged within {self._delivery_timeout:g} s: {self._last_error}.",
                    remedy=f"Check that a broker runs at {self._configs['bootstrap_servers']}, then send it again.",
                ),
            )

    def _listen(self) -> None:
        """Gives up a client that has said nothing for too long while the brokers answered others."""
        silent = self._watch.answering_seconds(self._heard)
        with self._changed:
            if self._handed and silent > longest_silence(self._configs):
                self._failure = self._failure or f"it has said nothing for {silent:.1f} s, and the brokers answer"

    def _hand_over(self) -> bool:
        """Gives queued records of topics that exist to the client, unless one that it knows is not the same any more.
        False where there was nothing to do, or no way.
        """
        with self._changed:
            waiting = [topic for topic, queue in self._queues.items() if queue]
            handed = bool(self._handed)
        if waiting:
            self._watch.follow(waiting)
        elif not handed:
            return False
        there = self._watch.topics()
        # A broker that lost its topics has forgotten the client's producer id too, of which the client may not hear for
        # long, or wait for ever: also what it was given already is then for another one.
        if any(there.get(name) != state for name, state in self._known.items()):
            self._failure = "a topic is gone, was made anew, or has other partitions"
            return True
        if not waiting:
            return False
        ready = [topic for topic in waiting if topic in there]
        if not ready or not self._connect():
            self._last_error = f"no broker, or no topic {', '.join(waiting)}" if not ready else self._last_error
            return False
        for topic in ready:
            self._known.setdefault(topic, there[topic])
            # Where there is one partition, it need not be computed: that takes as long as the rest of sending.
            partition = 0 if there[topic].partitions == 1 else None
            taken = self._taken(topic)
            for at, pending in enumerate(taken):
                failed = bool(self._failure)
                if failed or not self._give(pending, partition):
                    self._put_back(taken[at:])
                    return failed
        return True

    def _taken(self, topic: str) -> list[_Pending]:
        """Records from the queue, which are now the client's."""
        with self._changed:
            queue = self._queues[topic]
            taken = [queue.popleft() for _ in range(min(_HAND_OVER, len(queue)))]
            taken = [pending for pending in taken if pending.number in self._unfinished]  # or its deadline has passed
            if not self._handed:
                self._heard = time.monotonic()
            self._handed.update((pending.number, pending) for pending in taken)
        return taken

    def _give(self, pending: _Pending, partition: int | None) -> bool:
        """Hands over one record. False where the client does not take any now."""
        try:
            given = self._client.send(
                pending.topic,
                value=pending.value,
                key=pending.key,
                headers=list(pending.headers),
                partition=partition,
            )
        except kafka_errors.KafkaTimeoutError as error:  # it does not know the topic's partitions
            self._last_error = str(error)
            return False
        except kafka_errors.KafkaError as error:
            self._failed(pending, self._client, error)
            return False
        current = self._client
        given.add_callback(self._acknowledged, pending, current)
        given.add_errback(self._failed, pending, current)
        return True

    def _acknowledged(self, pending: _Pending, source: Any, metadata: Any) -> None:
        if metadata.offset < 0:
            # "Duplicate sequence number": ours, written before, or another producer's that has our id since the
            # broker lost its log. Only sending it again is safe.
            self._failed(pending, source, kafka_errors.KafkaError("the broker calls the record a duplicate"))
            return
        self._heard = time.monotonic()
        self._finish(pending, Position(pending.topic, metadata.partition, metadata.offset))

    def _failed(self, pending: _Pending, source: Any, error: Exception) -> None:
        self._last_error = str(error)
        refusal = _refusal(error, pending)
        if refusal is not None:
            self._finish(pending, refusal)
            return
        with self._changed:
            if source is not self._client or pending.number not in self._handed:
                return  # what a client says that was given up already
            self._failure = str(error)
            self._changed.notify_all()

    def _count(self) -> None:
        """Tells the metrics of what was acknowledged: of each record by itself, that takes as long as all else here."""
        with self._changed:
            acks, self._acks = self._acks, Count()
        for topic, count in acks.items():
            ACKED.labels(topic).inc(count)

    def _renew(self) -> None:
        """Lets the client finish what it can, drops it, and queues again, in order, what it has not delivered."""
        RENEWED.inc()
        logger.warning("a new producer takes over", extra={"reason": self._failure})
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, _RENEW_SECONDS)
        self._expire()  # what made the client fail may be a record's deadline, and dropping it takes seconds
        self._drop_client(drain=min(_DRAIN_SECONDS, self._delivery_timeout / 10))  # of the time of what waits
        with self._changed:
            again, self._handed = list(self._handed.values()), {}
            self._failure = ""
        self._put_back(again)

    def _put_back(self, again: list[_Pending]) -> None:
        with self._changed:
            for pending in sorted(again, key=lambda each: each.number, reverse=True):
                self._handed.pop(pending.number, None)
                if pending.number in self._unfinished:
                    self._queues[pending.topic].appendleft(pending)

    def _finish(self, pending: _Pending, result: Position | errors.ThumbwheelError) -> None:
        with self._changed:
            self._handed.pop(pending.number, None)
            if self._unfinished.pop(pending.number, None) is None:
                return
            self._bytes -= pending.size
            if isinstance(result, Position):
                self._acks[pending.topic] += 1
            self._ended.notify_all()
        if not isinstance(result, Position):
            FAILED.labels(pending.topic, type(result).__name__).inc()
        pending.end(pending.index, result)

    def _connect(self) -> bool:
        if self._client is None:
            try:
                self._client = client(
                    kafka.KafkaProducer,
                    **self._configs,
                    enable_idempotence=True,  # said aloud: left to its default, it may be turned off silently
                    acks="all",
                    # Not longer than ours: what comes after a record that it still tries would wait for that.
                    delivery_timeout_ms=int(self._delivery_timeout * 1000),
                    max_block_ms=int(_METADATA_SECONDS * 1000),
                    metrics_enabled=False,
                    max_request_size=MAX_MESSAGE_BYTES,
                )
            except (kafka_errors.KafkaError, OSError) as error:
                self._last_error = str(error)
                return False
        return True

    def _drop_client(self, drain: float) -> None:
        dropped, self._client, self._known = self._client, None, {}
        if dropped is None:
            return
        try:
            dropped.close(timeout=drain)
        except kafka_errors.KafkaTimeoutError:
            # Its `close` gives up before it has stopped its thread, and would be called again when it is collected.
            dropped._sender.force_close()
            dropped._sender.join(_DRAIN_SECONDS)
            dropped._closed = True


def _resolve(future: Future[Position], _: int, outcome: Outcome) -> None:
    if isinstance(outcome, Position):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)


def _refusal(error: Exception, pending: _Pending) -> errors.ThumbwheelError | None:
    """The error of a record that no other client could deliver either."""
    if isinstance(
        error,
        kafka_errors.MessageSizeTooLargeError | kafka_errors.RecordListTooLargeError | kafka_errors.InvalidRecordError,
    ):
        return errors.InvalidArgument(f"{pending.topic} does not take the record: {error}.", field="value")
    if isinstance(error, kafka_errors.InvalidTopicError):
        return errors.InvalidArgument(f"{pending.topic} cannot be the name of a topic.", field="topic")
    if isinstance(error, kafka_errors.AuthorizationError):
        return errors.PermissionDenied(f"{pending.topic} may not be written: {error}.")
    return None
