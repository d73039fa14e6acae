"""From the outbox to the broker: everything that is committed is published, at least once, in order for each key.

settle ──▶ are the topics there, and are they those we wrote to?  no: all is published again
   │
drain  ──▶ read the oldest unpublished → send, one a key at a time → the broker acknowledges → mark
   │
wait   ──▶ for a commit; every few seconds settle again, since a broker may lose its topics while nothing is sent
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from services.collector import metrics, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database, Work
from services.collector.outbox import Row
from services.collector.pause import RETRIED, Pause
from services.collector.rights.redaction import Redaction
from services.collector.rights.tenants import Tenants
from thumbwheel import errors, tracing
from thumbwheel.stream import topics
from thumbwheel.stream.log import Log, LossDetector, Outcome, Outgoing, Position, Producer, TopicPartition

logger = logging.getLogger(__name__)

WRITTEN = (topics.FEEDBACK, topics.COMPARISONS, topics.THUMBS, topics.DEADLETTER)
BROKER_SECONDS = 5.0


class Relay:
    """Publishes the outbox for ever. The only writer of the topics of feedback and comparisons."""

    def __init__(
        self, database: Database, log: Log, settings: CollectorSettings, redaction: Redaction | None = None
    ) -> None:
        self._database = database
        self._log = log
        self._settings = settings
        self._redaction = redaction or Redaction(Tenants())
        self._wake = asyncio.Event()
        self._pause = Pause(settings.max_backoff_seconds)
        self._producer: Producer | None = None
        self._detector: LossDetector | None = None
        self._settle_at = 0.0
        self._lost = False
        """A loss was seen, and it is not in the database yet that all is to be published again."""
        self._losses = 0

    @property
    def settled(self) -> bool:
        """Whether the topics are there and have been compared with what was written to them."""
        return self._producer is not None

    def wake(self) -> None:
        """Says that something was committed."""
        self._wake.set()

    async def run(self) -> None:
        """Publishes until it is cancelled. While the broker is away, or the disk full, tries again and again."""
        try:
            while True:
                try:
                    if time.monotonic() >= self._settle_at:
                        await self._settle()
                    await self._drain()
                    self._pause.reset()
                    await self._wait()
                except RETRIED as error:
                    logger.warning("publishing waits", extra={"error": str(error), "seconds": self._pause.seconds})
                    self._settle_at = 0.0
                    await self._pause.wait()
        finally:
            await self._stop_producing(BROKER_SECONDS)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._settle_at - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _drain(self) -> None:
        """Publishes until nothing waits. While the broker has some, the next are read and the last are marked."""
        losses = self._losses
        reading, marking = self._read(0), _nothing()
        try:
            while rows := await reading:
                reading = self._read(rows[-1].id)
                mark = await self._publish(rows)
                await marking
                marking = asyncio.create_task(self._database.write(mark))
                if losses != self._losses:
                    return  # all is to be published again, from the start
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await marking

    def _read(self, after: int) -> asyncio.Task[list[Row]]:
        self._wake.clear()  # before reading: what is committed later wakes again
        waiting = partial(outbox.waiting, limit=self._settings.publish_batch, after=after)
        return asyncio.create_task(self._database.read(waiting))

    async def _publish(self, rows: Sequence[Row]) -> Work[None]:
        """Publishes the rows. Returns what marks them. Raises the first fault, with all marked until then."""
        losses, detector, began = self._losses, self._detector, time.time()
        assert detector is not None, "settled before"
        published: list[int] = []
        refused: dict[int, str] = {}
        written: dict[TopicPartition, int] = {}
        counts: Counter[str] = Counter()
        lost, fault = False, None
        while rows and fault is None and not lost and losses == self._losses:
            # One a key: the next of a key is sent when the broker has the one before, or a fault could swap them.
            first: dict[tuple[str, bytes], Row] = {}
            for row in rows:
                first.setdefault((row.topic, row.key), row)
            rows = [row for row in rows if first[row.topic, row.key] is not row]
            for row, outcome in zip(first.values(), await self._send(list(first.values())), strict=True):
                if isinstance(outcome, Position):
                    published.append(row.id)
                    counts[row.topic] += 1
                    if row.traceparent:
                        tracing.record("collector.publish", parent=row.traceparent, began=began, topic=row.topic)
                    lost |= detector.acked(outcome)
                    written[TopicPartition(outcome.topic, outcome.partition)] = outcome.offset + 1
                elif isinstance(outcome, errors.InvalidArgument):
                    refused[row.id] = str(outcome)
                    metrics.PUBLISH_REFUSED.labels(row.topic).inc()
                    logger.error("an event is not published", extra={"id": row.id, "error": str(outcome)})
                else:
                    fault = fault or outcome
        for topic, count in counts.items():
            metrics.PUBLISHED.labels(topic).inc(count)
        # Where all is to be published again by now, these are too: who knows which broker acknowledged them.
        known = losses == self._losses
        mark = partial(outbox.mark, published=published, refused=refused, written=written) if known else _unmarked
        if fault is not None or (lost and known):
            await self._database.write(mark)
            mark = _unmarked
        if lost and known:
            await self._settle(lost=True)
        if fault is not None:
            raise fault
        return mark

    async def _send(self, rows: Sequence[Row]) -> list[Outcome]:
        """Where the broker put each row, or why it did not."""
        assert self._producer is not None, "settled before"
        producer = self._producer
        leaving = [self._leaving(row) for row in rows]
        sent = producer.send_all([one for one in leaving if not isinstance(one, errors.InvalidArgument)])
        done = asyncio.wrap_future(sent)
        while not done.done():
            await asyncio.wait([done], timeout=self._settings.loss_check_seconds)
            if not done.done():
                try:
                    await self._settle()  # the topics may have gone with the broker, and are then awaited in vain
                except RETRIED as error:
                    logger.warning("the broker does not acknowledge", extra={"error": str(error)})
        acknowledged = iter(done.result())
        return [one if isinstance(one, errors.InvalidArgument) else next(acknowledged) for one in leaving]

    def _leaving(self, row: Row) -> Outgoing | errors.InvalidArgument:
        """A row as it may leave; one that cannot be redacted is refused as the broker would refuse it."""
        try:
            return row.topic, row.key, self._redaction.outgoing(row.schema, row.value), row.headers
        except errors.InvalidArgument as error:
            return error

    async def _settle(self, *, lost: bool = False) -> None:
        """Makes sure of the topics and of the producer; where the broker lost what it held, starts all over."""
        settings, log = self._settings, self._log
        ids = await asyncio.to_thread(log.topic_ids, WRITTEN, BROKER_SECONDS)
        known = self._detector.topic_ids if self._detector is not None else {}
        if lost or any(ids.get(topic) != id for topic, id in known.items()):
            await self._stop_producing(0.0)
        if self._producer is None:
            # Never while something is on its way: in a topic made anew it would come before all that is older.
            made = topics.topics(partitions=settings.topic_partitions, replication=settings.topic_replication)
            await asyncio.to_thread(log.ensure_topics, made, BROKER_SECONDS)
            ids = await asyncio.to_thread(log.topic_ids, WRITTEN, BROKER_SECONDS)
        # Seen once, a loss stays one until it is written down: that may fail, and may be a matter of the next process.
        self._lost |= lost
        if self._detector is None:
            self._lost |= await self._resume(ids)
        else:
            self._lost |= self._detector.seen(ids)
        if self._lost:
            # 1. what waits is all there is  2. and belongs to the new topics  3. whose offsets begin anew
            self._losses += 1
            count = await self._database.write(partial(outbox.republish, ids=ids))
            self._detector, self._lost = LossDetector(ids), False
            metrics.LOSSES.inc()
            logger.warning("the broker lost what it held: all is published again", extra={"events": count})
            self._wake.set()
        if self._producer is None:
            self._producer = await asyncio.to_thread(log.producer)
        self._settle_at = time.monotonic() + settings.loss_check_seconds

    async def _resume(self, ids: dict[str, str]) -> bool:
        """Goes on where the last run stopped. True where the broker has less by now than it acknowledged then."""
        kept = await self._database.read(partial(outbox.load_topic_ids, topics=WRITTEN))
        written = await self._database.read(partial(outbox.load_positions, topics=WRITTEN))
        ends = await asyncio.to_thread(self._ends)
        detector = LossDetector(kept)
        lost = detector.seen(ids) or any(ends.get(tp, 0) < offset for tp, offset in written.items())
        for tp, offset in written.items():
            detector.acked(Position(tp.topic, tp.partition, offset - 1))
        if not lost:
            await self._database.write(partial(outbox.save_topic_ids, ids=ids))
        self._detector = detector
        return lost

    def _ends(self) -> dict[TopicPartition, int]:
        consumer = self._log.consumer(WRITTEN, group="collector-relay")
        try:
            return consumer.end_offsets()
        finally:
            consumer.close()

    async def _stop_producing(self, seconds: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                await asyncio.to_thread(producer.close, seconds)
            except errors.ThumbwheelError as error:
                logger.warning("events stay in the outbox", extra={"error": str(error)})


def _unmarked(connection: Connection) -> None:
    """Where there is nothing to mark."""


def _nothing() -> asyncio.Future[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done
