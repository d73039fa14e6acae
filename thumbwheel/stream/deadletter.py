"""What happens to a record that cannot be used: it goes to the `deadletter` topic, and its partition goes on.

The order is fixed: dead letter sent, dead letter acknowledged, and only then the next record. A consumer that cannot
deliver its dead letter stops, and reads the record again when it is started again: never blocked, never lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from concurrent.futures import Future
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from prometheus_client import Counter
from uuid_utils import uuid7

from thumbwheel import errors
from thumbwheel.stream.aio import acked
from thumbwheel.stream.log import Position, Producer, Record
from thumbwheel.stream.topics import DEADLETTER, topics
from thumbwheel.v1.events_pb2 import DeadLetter

logger = logging.getLogger(__name__)

DEAD_LETTERS = Counter(
    "thumbwheel_stream_dead_letters_total", "Records given up, by the topic they came from.", ["topic"]
)

for _topic in topics(partitions=1, replication=1):
    DEAD_LETTERS.labels(_topic.name)  # from 0 on, or the first would be no increase

MAX_VALUE_BYTES = 1_500_000
"""Longest value that a dead letter carries whole; it must itself fit into a record."""

_RETRY_SECONDS = 0.5

M = TypeVar("M", bound=Message)


def decode(message_type: type[M], record: Record) -> M:
    """The message in a record.

    Raises `errors.InvalidArgument` where the bytes are none, or where the header `schema` says they are another.
    """
    where, expected = f"{record.topic}[{record.partition}] offset {record.offset}", message_type.DESCRIPTOR.full_name
    schema = next((value.decode(errors="replace") for key, value in record.headers if key == "schema"), expected)
    if schema != expected:
        raise errors.InvalidArgument(f"{where} is a {schema}, not a {expected}.", field="headers.schema")
    if not record.value:
        raise errors.InvalidArgument(f"{where} is empty, not a {expected}.", field="value")
    message = message_type()
    try:
        message.ParseFromString(record.value)
    except DecodeError as error:
        raise errors.InvalidArgument(f"{where} is not a {expected}: {error}.", field="value") from error
    return message


def publish(producer: Producer, record: Record, *, reason: str, consumer: str) -> Future[Position]:
    """Sends a dead letter. Do not go past `record` before the future resolves; send again where it fails.

    `consumer` says who gives the record up. A value too long for a record is cut, and the reason says so.
    """
    value = record.value
    if len(value) > MAX_VALUE_BYTES:
        digest = hashlib.sha256(value).hexdigest()
        reason = f"{reason} (first {MAX_VALUE_BYTES} of {len(value)} bytes kept, sha256 of all {digest})"
        value = value[:MAX_VALUE_BYTES]
    letter = DeadLetter(
        event_id=str(uuid7()),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=value,
        reason=reason,
        consumer=consumer,
    )
    for name, content in record.headers:
        letter.headers.add(key=name, value=content)
    letter.at.GetCurrentTime()
    logger.error(
        "record given up",
        extra={"topic": record.topic, "partition": record.partition, "offset": record.offset, "reason": reason},
    )
    headers = (("schema", letter.DESCRIPTOR.full_name.encode()), ("event_id", letter.event_id.encode()))
    future = producer.send(DEADLETTER, record.topic.encode(), letter.SerializeToString(), headers)
    future.add_done_callback(lambda done: None if done.exception() else DEAD_LETTERS.labels(record.topic).inc())
    return future


async def bury(producer: Producer, record: Record, *, reason: str, consumer: str, timeout: float = 60.0) -> None:
    """Publishes a dead letter and waits for its acknowledgement, again and again while the broker is away.

    Raises `errors.Unavailable` or `errors.DeadlineExceeded` after `timeout` seconds; then the caller must stop.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            await acked(publish(producer, record, reason=reason, consumer=consumer), max(left, 0.0))
        except (errors.Unavailable, errors.ResourceExhausted):
            if left < _RETRY_SECONDS:
                raise
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return
