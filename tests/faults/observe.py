"""What the checker looks at: the stream through kafka-python, the database through plain SQL. Nothing of ours reads."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from tests.faults.checker import Delivery, FeedbackRow, OutboxRow
from thumbwheel.stream.kafka_client import client, kafka
from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, FeedbackEvent
from thumbwheel.v1.preference_pb2 import FeedbackState

FEEDBACK = "thumbwheel.feedback.v1"
COMPARISONS = "thumbwheel.comparisons.v1"

Query = Callable[[str], list[tuple[Any, ...]]]

_FEEDBACK_ROWS = """
SELECT feedback_id, idempotency_key, state, coalesce(comparison_id, ''),
       (SELECT count(*) FROM feedback_generations g WHERE g.feedback_id = f.feedback_id)
FROM feedback f ORDER BY received_at, feedback_id
"""
_OUTBOX_ROWS = "SELECT id, event_id, topic, key, published_at IS NOT NULL AND refused IS NULL FROM outbox ORDER BY id"
_WAITING = """
SELECT (SELECT count(*) FROM door.inbox),
       (SELECT count(*) FROM outbox WHERE published_at IS NULL),
       (SELECT count(*) FROM feedback WHERE state = 'HELD')
"""


def sqlite_query(path: Path) -> Query:
    """Asks a SQLite file, and the inbox beside it, each time through a new connection."""
    inbox = path.with_name(f"{path.stem}-inbox{path.suffix}")

    def query(sql: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as connection:
            connection.execute("ATTACH ? AS door", (f"file:{inbox}?mode=ro",)).close()
            return connection.execute(sql).fetchall()

    return query


def postgres_query(conninfo: str) -> Query:
    """Asks a PostgreSQL server, each time through a new connection."""

    def query(sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(conninfo) as connection:
            return connection.execute(sql.encode()).fetchall()

    return query


def feedback_rows(query: Query) -> list[FeedbackRow]:
    """All feedback."""
    return [FeedbackRow(*row) for row in query(_FEEDBACK_ROWS)]


def outbox_rows(query: Query) -> list[OutboxRow]:
    """All events."""
    return [
        OutboxRow(id, event_id, topic, bytes(key).decode(), bool(published))
        for id, event_id, topic, key, published in query(_OUTBOX_ROWS)
    ]


class Waiting(NamedTuple):
    """What is yet to be recorded, to be published, and to have its generations."""

    unrecorded: int
    unpublished: int
    held: int


def waiting(query: Query) -> Waiting:
    """How much of what was acknowledged waits."""
    [row] = query(_WAITING)
    return Waiting(*row)


def _feedback(value: bytes) -> tuple[str, str, tuple[str, ...], str, str, str]:
    event = FeedbackEvent.FromString(value)
    state = FeedbackState.Name(event.record.state).removeprefix("FEEDBACK_STATE_")
    return event.event_id, state, (event.record.feedback_id,), event.record.comparison_id, "", ""


def _comparison(value: bytes) -> tuple[str, str, tuple[str, ...], str, str, str]:
    event = ComparisonEvent.FromString(value)
    state = ComparisonState.Name(event.state).removeprefix("COMPARISON_STATE_")
    chosen, rejected = event.chosen.generation_id, event.rejected.generation_id
    return event.event_id, state, tuple(event.feedback_ids), event.comparison_id, chosen, rejected


class Reader:
    """Reads both topics from their start for as long as a broker lives, in a thread of its own, as a trainer would.

    Made anew for each life of the broker; what all of them read is the history.
    """

    def __init__(self, servers: str, life: int, into: list[Delivery]) -> None:
        self._servers = servers
        self._life = life
        self._into = into
        self._stop = threading.Event()
        self._end_wanted = threading.Event()
        self._at_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"reader-{life}", daemon=True)
        self._thread.start()

    def read_to_end(self, seconds: float) -> None:
        """Returns when all that was published before the call has been read."""
        self._end_wanted.set()
        if not self._at_end.wait(seconds):
            raise TimeoutError(f"the stream was not read to its end within {seconds:g} s")

    def stop(self) -> None:
        """Reads no more."""
        self._stop.set()
        self._thread.join(30.0)
        assert not self._thread.is_alive(), "the reader hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with contextlib.closing(self._consumer()) as consumer:
                    self._follow(consumer)
            except (kafka_errors.KafkaError, OSError):
                self._stop.wait(0.05)  # the broker is being killed, or starts

    def _consumer(self) -> Any:
        return client(
            kafka.KafkaConsumer,
            bootstrap_servers=self._servers,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            request_timeout_ms=3_000,
            bootstrap_timeout_ms=1_000,
            reconnect_backoff_max_ms=200,
        )

    def _follow(self, consumer: Any) -> None:
        partitions: list[Any] = []
        while not self._stop.is_set() and len({tp.topic for tp in partitions}) < 2:
            partitions = [
                kafka.TopicPartition(topic, partition)
                for topic in (FEEDBACK, COMPARISONS)
                for partition in consumer.partitions_for_topic(topic) or ()
            ]
        consumer.assign(partitions)
        read: dict[Any, int] = dict.fromkeys(partitions, 0)
        for tp in partitions:
            consumer.seek(tp, 0)
        while not self._stop.is_set():
            ending = self._end_wanted.is_set()
            ends = consumer.end_offsets(partitions) if ending else {}
            for tp, records in consumer.poll(timeout_ms=100, max_records=2_000).items():
                self._into += [self._delivery(tp.topic, record) for record in records]
                read[tp] = consumer.position(tp)
            if ending and all(read[tp] >= end for tp, end in ends.items()):
                self._at_end.set()

    def _delivery(self, topic: str, record: Any) -> Delivery:
        decoded = (_feedback if topic == FEEDBACK else _comparison)(record.value)
        return Delivery(self._life, topic, record.key.decode(), *decoded)


def await_none_waiting(query: Query, seconds: float) -> None:
    """Returns when nothing waits to be recorded or published, and nothing is held. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = waiting(query)
        except psycopg.OperationalError as error:  # it still recovers from having been killed
            left = None
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:g} s, the database does not answer") from error
        if left == (0, 0, 0):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s, there are still {left}")
        time.sleep(0.05)
