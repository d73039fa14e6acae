"""What the collector is measured against: a gRPC echo, plain inserts through the database's driver, a plain producer.

`python -m bench.collector_peers` runs the echo and prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import psycopg

from thumbwheel.stream.kafka_client import MAX_MESSAGE_BYTES, client, kafka
from thumbwheel.v1.preference_pb2 import SubmitFeedbackRequest

ECHO = "/echo.Echo/Echo"
TABLES = ("feedback", "feedback_generations", "decisions", "decision_votes", "outbox")

Rows = dict[str, list[tuple[Any, ...]]]


async def echo() -> None:
    """Answers each request with itself, decoded and encoded again. Prints its port first."""

    async def answer(request: SubmitFeedbackRequest, context: object) -> SubmitFeedbackRequest:
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        answer, SubmitFeedbackRequest.FromString, SubmitFeedbackRequest.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


class Group(NamedTuple):
    """What one commit holds: rows by table."""

    rows: Rows


def groups(rows: Rows, size: int) -> Iterator[Group]:
    """The rows, each behind its feedback, in commits of `size` submissions each; those of the outbox in proportion."""
    ids = [row[0] for row in rows["feedback"]]
    keys = {table: [row[0] for row in rows[table]] for table in TABLES if table != "outbox"}
    events = len(rows["outbox"])
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        ends = {table: (bisect_left(of, ids[start]), bisect_right(of, ids[end - 1])) for table, of in keys.items()}
        ends["outbox"] = events * start // len(ids), events * end // len(ids)
        yield Group({table: [row[1:] for row in rows[table][low:high]] for table, (low, high) in ends.items()})


class Plain:
    """Inserts rows through a driver: SQLite as the collector sets it, or PostgreSQL. No lookups, no library above."""

    def __init__(self, target: Path | str, columns: Mapping[str, Sequence[str]]) -> None:
        self._connection: Any
        if isinstance(target, Path):
            self._connection, mark = sqlite3.connect(target, isolation_level=None), "?"
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._connection.execute(f"PRAGMA {pragma}").close()
            self._begin = "BEGIN IMMEDIATE"
        else:
            self._connection, mark = psycopg.connect(target, autocommit=True), "%s"
            self._begin = "BEGIN"
        self._inserts = {
            table: f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})"
            for table, names in columns.items()
        }

    def commit(self, group: Group) -> float:
        """Makes a group durable. Returns the seconds that the commit itself took."""
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(self._begin)
            for table in TABLES:
                cursor.executemany(self._inserts[table], group.rows[table])
            began = time.perf_counter()
            cursor.execute("COMMIT")
            return time.perf_counter() - began

    def clear(self) -> None:
        """Empties the tables."""
        for table in reversed(TABLES):
            self._connection.execute(f"DELETE FROM {table}")

    def close(self) -> None:
        """Lets go."""
        self._connection.close()


class Event(NamedTuple):
    """A record of the stream."""

    topic: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


def produce(servers: str, events: Sequence[Event]) -> float:
    """Writes the events with kafka-python, set as the relay sets it. Returns records a second, acknowledged."""
    producer = client(
        kafka.KafkaProducer,
        bootstrap_servers=servers,
        enable_idempotence=True,
        acks="all",
        max_request_size=MAX_MESSAGE_BYTES,
        metrics_enabled=False,
    )
    try:
        for topic in {event.topic for event in events}:
            producer.partitions_for(topic)
        began = time.perf_counter()
        sent = [producer.send(e.topic, key=e.key, value=e.value, headers=e.headers) for e in events]
        producer.flush(60.0)
        seconds = time.perf_counter() - began
        assert all(future.succeeded() for future in sent)
        return len(events) / seconds
    finally:
        producer.close(5.0)


if __name__ == "__main__":
    asyncio.run(echo())
