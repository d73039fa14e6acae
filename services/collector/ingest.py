"""From the broker to the record: generations are stored, and what waited for them is joined.

    poll ──▶ decode ──▶ one transaction: generations · joins · outbox · dead letters · offsets

The offsets are committed with the rows, and reading starts from them: each record counts exactly once, whatever dies
when. After a fault the consumer is made anew from the offsets in the database, which loses and doubles nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection
from uuid_utils import uuid7

from services.collector import ledger, metrics, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.intake import Curator
from services.collector.pause import RETRIED, Pause
from services.collector.records import Recorded
from services.collector.rights import admission
from services.collector.rights.tenants import Tenants
from services.collector.submission import check_id
from thumbwheel import errors, tracing
from thumbwheel.stream import aio, deadletter, topics
from thumbwheel.stream.log import Consumer, Log, Record, TopicPartition
from thumbwheel.v1.events_pb2 import DeadLetter, GenerationEvent, Header

logger = logging.getLogger(__name__)

GROUP = "collector"
READ = (topics.GENERATIONS,)
MAX_RECORDS = 200


@dataclass(frozen=True, slots=True)
class Batch:
    """Records as decoded, those that could not be, and where reading goes on after them."""

    events: Sequence[GenerationEvent]
    dead: Sequence[DeadLetter]
    positions: Mapping[TopicPartition, int]
    topic_ids: Mapping[str, str]
    traceparents: Sequence[str] = ()
    """Those of the events that carry one."""

    def apply(self, connection: Connection, curator: Curator, tenants: Tenants) -> list[Recorded]:
        """Writes the batch, but what must not be kept. Returns the feedback that was joined."""
        joined = ledger.store(connection, curator, admission.admitted(connection, self.events, tenants))
        outbox.add(connection, [outbox.Event(d.event_id, topics.DEADLETTER, d.topic, d) for d in self.dead])
        outbox.save_positions(connection, self.positions)
        outbox.save_topic_ids(connection, self.topic_ids)
        return joined


class Ingest:
    """Follows the generations for ever. `committed` is called after each commit."""

    def __init__(
        self,
        database: Database,
        log: Log,
        settings: CollectorSettings,
        curator: Curator,
        committed: Callable[[], None],
        tenants: Tenants | None = None,
    ) -> None:
        self._database = database
        self._log = log
        self._settings = settings
        self._curator = curator
        self._committed = committed
        self._tenants = tenants or Tenants()
        self._pause = Pause(settings.max_backoff_seconds)

    async def run(self) -> None:
        """Stores what comes until it is cancelled. While the broker is away, or the disk full, tries again."""
        while True:
            try:
                await self._follow()
            except RETRIED as error:
                logger.warning("reading waits", extra={"error": str(error), "seconds": self._pause.seconds})
                await self._pause.wait()

    async def _follow(self) -> None:
        consumer = await self._open()
        try:
            batches = aio.records(consumer, max_records=MAX_RECORDS, poll_timeout=self._settings.poll_seconds)
            async with contextlib.aclosing(batches):
                async for records in batches:
                    await self._apply(await asyncio.to_thread(decode_batch, records, consumer))
                    self._pause.reset()
        finally:
            await asyncio.to_thread(consumer.close)

    async def _open(self) -> Consumer:
        start = await self._database.read(partial(outbox.load_positions, topics=READ))
        ids = await self._database.read(partial(outbox.load_topic_ids, topics=READ))
        return await asyncio.to_thread(self._log.consumer, READ, group=GROUP, start=start, topic_ids=ids)

    async def _apply(self, batch: Batch) -> None:
        began = time.time()
        work = partial(batch.apply, curator=self._curator, tenants=self._tenants)
        joined = await self._database.write(work)
        self._committed()
        for traceparent in batch.traceparents:
            tracing.record("collector.ingest", parent=traceparent, began=began)
        metrics.GENERATIONS.inc(len(batch.events))
        metrics.DEAD_LETTERS.inc(len(batch.dead))
        metrics.told(joined)
        for dead in batch.dead:
            where = {"topic": dead.topic, "partition": dead.partition, "offset": dead.offset}
            logger.warning("a record could not be used", extra={**where, "reason": dead.reason})


def decode_batch(records: Sequence[Record], consumer: Consumer) -> Batch:
    """The batch that these records are, and where `consumer` goes on after them."""
    events: list[GenerationEvent] = []
    dead: list[DeadLetter] = []
    traceparents: list[str] = []
    for record in records:
        try:
            event = decode(record)
            # What is generated in bulk has no receipt, so no feedback about it can come.
            if not event.bulk:
                events.append(event)
                if carried := tracing.of_record(record.headers):
                    traceparents.append(carried)
        except errors.InvalidArgument as error:
            dead.append(dead_letter(record, str(error)))
    return Batch(events, dead, consumer.positions(), consumer.topic_ids(), traceparents)


def decode(record: Record) -> GenerationEvent:
    """The event in a record. Raises `errors.InvalidArgument` naming what is wrong with it."""
    event = deadletter.decode(GenerationEvent, record)
    generation = event.generation
    check_id(event.tenant, "tenant")
    if event.user_id:
        check_id(event.user_id, "user_id")
    check_id(generation.generation_id, "generation.generation_id")
    check_id(generation.prompt_id, "generation.prompt_id")
    if len(generation.logprobs) not in (0, len(generation.token_ids)):
        raise errors.InvalidArgument(
            f"has {len(generation.logprobs)} for {len(generation.token_ids)} tokens.", field="generation.logprobs"
        )
    return event


def dead_letter(record: Record, reason: str) -> DeadLetter:
    """What is kept of a record that cannot be used: where it was, why, and as much of it as a record holds."""
    value = record.value[: deadletter.MAX_VALUE_BYTES]
    if len(value) < len(record.value):
        reason = f"{reason} (first {len(value)} of {len(record.value)} bytes kept)"
    letter = DeadLetter(
        event_id=str(uuid7()),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=value,
        headers=[Header(key=key, value=value) for key, value in record.headers],
        reason=reason,
        consumer=GROUP,
    )
    letter.at.GetCurrentTime()
    return letter
