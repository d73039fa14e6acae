"""The log on Kafka: any broker that speaks its protocol, embedded or not.

Of the protocol it takes what every broker has: idempotent produce, fetch, list offsets, create topics, commit. It
joins no groups and uses no transactions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from thumbwheel.stream.kafka_consumer import KafkaLogConsumer
from thumbwheel.stream.kafka_producer import KafkaLogProducer
from thumbwheel.stream.kafka_watch import Watch
from thumbwheel.stream.log import Topic, TopicPartition
from thumbwheel.tls import ClientTls

_CLOSE_SECONDS = 5.0


class KafkaLog:
    """A `Log` on the brokers at `bootstrap_servers`, "host:port,host:port". Thread-safe; does not wait for a broker.

    `delivery_timeout` is the deadline of a record in seconds; a producer holds at most `queue_records` and
    `queue_bytes` of what is not acknowledged. What the brokers hold is looked at every `refresh_interval` seconds,
    which bounds how late the loss of a log is noticed. No single request takes longer than `request_timeout` seconds.
    Raises `errors.FailedPrecondition` for a file of `tls` that cannot be used.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        delivery_timeout: float = 30.0,
        queue_records: int = 10_000,
        queue_bytes: int = 64 * 1024 * 1024,
        refresh_interval: float = 1.0,
        request_timeout: float = 5.0,
        tls: ClientTls | None = None,
    ) -> None:
        if tls is not None:
            tls.read()  # what is unusable is told now, not at the first connection
        self._delivery_timeout = delivery_timeout
        self._queue_records = queue_records
        self._queue_bytes = queue_bytes
        self._configs = {
            "bootstrap_servers": bootstrap_servers.split(","),
            "client_id": "thumbwheel",
            "bootstrap_timeout_ms": int(min(request_timeout, 2.0) * 1000),
            "request_timeout_ms": int(request_timeout * 1000),
            "reconnect_backoff_max_ms": 500,
            "metadata_max_age_ms": 30_000,
            "tls": tls,
        }
        self._watch = Watch(self._configs, interval=refresh_interval)

    def ensure_topics(self, topics: Iterable[Topic], timeout: float) -> None:
        """See `Log.ensure_topics`. Should a broker lose them later, they are created again, but for those that are
        `republished`.
        """
        self._watch.ensure(topics, timeout)

    def topic_ids(self, topics: Sequence[str], timeout: float) -> dict[str, str]:
        """See `Log.topic_ids`. A broker that knows no ids (Kafka before 2.8) has "" for all."""
        return {name: state.id for name, state in self._watch.fresh(topics, timeout).items()}

    def producer(self) -> KafkaLogProducer:
        """See `Log.producer`."""
        return KafkaLogProducer(
            self._configs,
            self._watch,
            delivery_timeout=self._delivery_timeout,
            queue_records=self._queue_records,
            queue_bytes=self._queue_bytes,
        )

    def consumer(
        self,
        topics: Sequence[str],
        *,
        group: str,
        start: Mapping[TopicPartition, int] | None = None,
        topic_ids: Mapping[str, str] | None = None,
    ) -> KafkaLogConsumer:
        """See `Log.consumer`."""
        return KafkaLogConsumer(
            self._configs, self._watch, topics, group=group, start=start or {}, topic_ids=topic_ids or {}
        )

    def close(self) -> None:
        """See `Log.close`. Producers and consumers are to be closed before."""
        self._watch.close(_CLOSE_SECONDS)
