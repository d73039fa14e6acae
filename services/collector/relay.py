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
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from services.collector import metrics, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.outbox import Row
from services.collector.pause import RETRIED, Pause
from services.collector.rights.redaction import Redaction
from services.collector.rights.tenants import Tenants
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.log import Log, LossDetector, Position, Producer, TopicPartition

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
            await self._stop_producing()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._settle_at - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _drain(self) -> None:
        while True:
            self._wake.clear()
            rows = await self._database.read(partial(outbox.waiting, limit=self._settings.publish_batch))
            if not rows:
                return
            await self._publish(rows)

    async def _publish(self, rows: Sequence[Row]) -> None:
        """Publishes the rows and marks them. Raises the first fault; what was acknowledged until then is marked."""
        losses, detector = self._losses, self._detector
        assert detector is not None, "settled before"
        published: list[int] = []
        refused: dict[int, str] = {}
        written: dict[TopicPartition, int] = {}
        lost, fault = False, None
        while rows and fault is None:
            # One a key: the next of a key is sent when the broker has the one before, or a fault could swap them.
            first: dict[tuple[str, bytes], Row] = {}
            for row in rows:
                first.setdefault((row.topic, row.key), row)
            rows = [row for row in rows if first[row.topic, row.key] is not row]
            for row, outcome in zip(first.values(), await self._send(list(first.values())), strict=True):
                if isinstance(outcome, Position):
                    published.append(row.id)
                    metrics.PUBLISHED.labels(row.topic).inc()
                    lost |= detector.acked(outcome)
                    written[TopicPartition(outcome.topic, outcome.partition)] = outcome.offset + 1
                elif isinstance(outcome, errors.InvalidArgument):
                    refused[row.id] = str(outcome)
                    metrics.PUBLISH_REFUSED.labels(row.topic).inc()
                    logger.error("an event is not published", extra={"id": row.id, "error": str(outcome)})
                else:
                    fault = fault or outcome
        # Where all is to be published again by now, these are too: who knows which broker acknowledged them.
        if losses == self._losses:
            mark = partial(outbox.mark, published=published, refused=refused, written=written)
            await self._database.write(mark)
            if lost:
                await self._settle(lost=True)
        if fault is not None:
            raise fault

    async def _send(self, rows: Sequence[Row]) -> list[Position | BaseException]:
        """Where the broker put each row, or why it did not."""
        assert self._producer is not None, "settled before"
        producer = self._producer
        sent = [asyncio.wrap_future(self._sent(producer, row)) for row in rows]
        waiting = set(sent)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=self._settings.loss_check_seconds)
            if waiting:
                try:
                    await self._settle()  # the topics may have gone with the broker, and are then awaited in vain
                except RETRIED as error:
                    logger.warning("the broker does not acknowledge", extra={"error": str(error)})
        return [future.exception() or future.result() for future in sent]

    def _sent(self, producer: Producer, row: Row) -> Future[Position]:
        """Sends a row as it may leave; one that cannot be redacted is refused as the broker would refuse it."""
        try:
            return producer.send(row.topic, row.key, self._redaction.outgoing(row.schema, row.value), row.headers)
        except errors.InvalidArgument as error:
            refused: Future[Position] = Future()
            refused.set_exception(error)
            return refused

    async def _settle(self, *, lost: bool = False) -> None:
        """Makes sure of the topics and of the producer; where the broker lost what it held, starts all over."""
        settings, log = self._settings, self._log
        made = topics.topics(partitions=settings.topic_partitions, replication=settings.topic_replication)
        await asyncio.to_thread(log.ensure_topics, made, BROKER_SECONDS)
        ids = await asyncio.to_thread(log.topic_ids, WRITTEN, BROKER_SECONDS)
        if self._detector is None:
            lost |= await self._resume(ids)
        else:
            lost |= self._detector.seen(ids)
        if lost:
            # 1. what waits is all there is  2. and belongs to the new topics  3. whose offsets begin anew
            self._losses += 1
            count = await self._database.write(partial(outbox.republish, ids=ids))
            self._detector = LossDetector(ids)
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

    async def _stop_producing(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                await asyncio.to_thread(producer.close, BROKER_SECONDS)
            except errors.ThumbwheelError as error:
                logger.warning("events stay in the outbox", extra={"error": str(error)})
