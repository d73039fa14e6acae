"""What the collector is measured against: a gRPC echo, plain inserts through the database's driver, a plain producer.

`python -m bench.collector_peers` runs the echo and prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import psycopg

from thumbwheel.stream.kafka_client import MAX_MESSAGE_BYTES, client, kafka
from thumbwheel.v1.preference_pb2 import SubmitFeedbackRequest

ECHO = "/echo.Echo/Echo"
Rows = Sequence[tuple[Any, ...]]


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


def groups(rows: Rows, size: int) -> Iterator[Rows]:
    """The rows, as many as one commit holds at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class Plain:
    """Inserts rows of the inbox by a driver: SQLite as the collector sets it, or PostgreSQL. No lookups, no library."""

    def __init__(self, target: Path | str, columns: Sequence[str]) -> None:
        self._connection: Any
        if isinstance(target, Path):
            self._connection, table, mark = sqlite3.connect(target, isolation_level=None), "inbox", "?"
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                self._connection.execute(f"PRAGMA {pragma}").close()
            self._begin = "BEGIN IMMEDIATE"
        else:
            self._connection, table, mark = psycopg.connect(target, autocommit=True), "door.inbox", "%s"
            self._begin = "BEGIN"
        self._insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join([mark] * len(columns))})"

    def commit(self, rows: Rows) -> None:
        """Makes a group durable."""
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(self._begin)
            cursor.executemany(self._insert, rows)
            cursor.execute("COMMIT")

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
