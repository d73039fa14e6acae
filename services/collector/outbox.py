"""The transactional outbox: what is to be published is committed together with what it says.

Rows are kept after publishing, for good: they are the history of what consumers were told, and it cannot be had from
the record alone, which knows where things stand and not every state they went through. Should the broker lose what it
held, everything is published again from here; `thumbwheel collector replay` does so when asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from google.protobuf.message import Message
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from services.collector.metrics import Levels
from services.collector.tables import feedback, held, inbox, outbox, positions, topic_ids, unpublished
from thumbwheel.stream.log import Headers, TopicPartition

_BETWEEN = outbox.c.id.between(bindparam("first"), bindparam("last"))
_MARK = update(outbox).where(_BETWEEN).values(published_at=bindparam("at"))


class Event(NamedTuple):
    """An event to be published."""

    event_id: str
    topic: str
    key: str
    message: Message
    traceparent: str = ""


class Row(NamedTuple):
    """An event as it waits in the outbox."""

    id: int
    event_id: str
    topic: str
    key: bytes
    schema: str
    value: bytes
    traceparent: str

    @property
    def headers(self) -> Headers:
        """What tells a reader what the record is before it decodes it."""
        headers: Headers = (("schema", self.schema.encode()), ("event_id", self.event_id.encode()))
        return (*headers, ("traceparent", self.traceparent.encode())) if self.traceparent else headers


def now_micros() -> int:
    """The time, in microseconds since the epoch."""
    return time.time_ns() // 1_000


def add(connection: Connection, events: Iterable[Event]) -> None:
    """Puts events in, in the order in which they are to be published."""
    now = now_micros()
    rows = [
        {
            "event_id": event.event_id,
            "topic": event.topic,
            "key": event.key.encode(),
            "schema": event.message.DESCRIPTOR.full_name,
            "value": event.message.SerializeToString(),
            "traceparent": event.traceparent,
            "created_at": now,
        }
        for event in events
    ]
    if rows:
        connection.execute(insert(outbox), rows)


def waiting(connection: Connection, limit: int, after: int = 0) -> list[Row]:
    """The oldest events behind `after` that are not published, in order."""
    columns = [outbox.c[name] for name in Row._fields]
    rows = select(*columns).where(unpublished, outbox.c.id > after).order_by(outbox.c.id).limit(limit)
    return [Row(*row) for row in connection.execute(rows)]


def mark(
    connection: Connection, published: Sequence[int], refused: Mapping[int, str], written: Mapping[TopicPartition, int]
) -> None:
    """Notes what the broker has acknowledged, what it will never take and why, and how far each partition got."""
    now = now_micros()
    if published:
        connection.execute(_MARK, [{"first": first, "last": last, "at": now} for first, last in _runs(published)])
    for row, why in refused.items():
        connection.execute(update(outbox).where(outbox.c.id == row).values(published_at=now, refused=why[:512]))
    save_positions(connection, written)


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of numbers without a gap; mostly there is but one run."""
    ordered = sorted(numbers)
    for _, run in groupby(enumerate(ordered), key=lambda each: each[1] - each[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]


def republish(connection: Connection, ids: Mapping[str, str]) -> int:
    """The broker lost what it held: all is to be published again, to topics with these ids. Returns how many wait."""
    # Refused events stay refused: the broker's limits are not lost with its data.
    connection.execute(
        update(outbox).where(outbox.c.published_at.is_not(None), outbox.c.refused.is_(None)).values(published_at=None)
    )
    connection.execute(delete(positions).where(positions.c.topic.in_(list(ids))))
    save_topic_ids(connection, ids)
    count: int = connection.execute(select(func.count()).select_from(outbox).where(unpublished)).scalar_one()
    return count


def replay(connection: Connection, since: int) -> int:
    """What was committed at or after `since` (microseconds since the epoch) is to be published again. Returns how much.

    It goes out in the order of committing, with the bytes and ids it had: consumers drop what they have seen.
    """
    again = outbox.c.published_at.is_not(None) & outbox.c.refused.is_(None) & (outbox.c.created_at >= since)
    return connection.execute(update(outbox).where(again).values(published_at=None)).rowcount


def load_positions(connection: Connection, topics: Sequence[str]) -> dict[TopicPartition, int]:
    """The positions kept for these topics."""
    found = select(positions.c.topic, positions.c.partition, positions.c.offset).where(positions.c.topic.in_(topics))
    return {TopicPartition(topic, partition): offset for topic, partition, offset in connection.execute(found)}


def save_positions(connection: Connection, at: Mapping[TopicPartition, int]) -> None:
    """Keeps these positions."""
    for tp, offset in at.items():
        here = (positions.c.topic == tp.topic) & (positions.c.partition == tp.partition)
        if not connection.execute(update(positions).where(here).values(offset=offset)).rowcount:
            connection.execute(insert(positions), {"topic": tp.topic, "partition": tp.partition, "offset": offset})


def load_topic_ids(connection: Connection, topics: Sequence[str]) -> dict[str, str]:
    """The ids kept for these topics."""
    found = select(topic_ids.c.topic, topic_ids.c.topic_id).where(topic_ids.c.topic.in_(topics))
    return {row.topic: row.topic_id for row in connection.execute(found)}


def save_topic_ids(connection: Connection, ids: Mapping[str, str]) -> None:
    """Keeps these ids."""
    for topic, id in ids.items():
        if not connection.execute(update(topic_ids).where(topic_ids.c.topic == topic).values(topic_id=id)).rowcount:
            connection.execute(insert(topic_ids), {"topic": topic, "topic_id": id})


def levels(connection: Connection) -> Levels:
    """What waits to be recorded, to be published, and for its generations."""
    unrecorded, since = connection.execute(select(func.count(), func.min(inbox.c.received_at))).one()
    depth, oldest = connection.execute(
        select(func.count(), func.min(outbox.c.created_at)).select_from(outbox).where(unpublished)
    ).one()
    count: int = connection.execute(select(func.count()).select_from(feedback).where(held)).scalar_one()
    return Levels(depth, min((at for at in (since, oldest) if at is not None), default=None), count, unrecorded)
