"""Recording generations on the stream, never in the way of serving.

    record ──▶ memory ──keep──▶ spool on disk ──send──▶ broker
                  └── the disk fails: straight on ───────▲

`record` only appends to a list; disk and broker are waited for by two background tasks. While the broker is away events
wait on disk, also through a restart of this process; when it is back they are sent in order. When it turns out to have
lost what it held, all that the spool still has is sent once more. Consumers drop ids they have seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

from services.policy.spool import Entry, Row, Spool
from thumbwheel import errors, tracing
from thumbwheel.stream import topics
from thumbwheel.stream.log import Headers, Log, LossDetector, Position, Producer
from thumbwheel.v1.events_pb2 import GenerationEvent

logger = logging.getLogger(__name__)

RECORDED = Counter("thumbwheel_recorder_events_total", "Generation events, by what became of them.", ["outcome"])
WAITING = Gauge("thumbwheel_recorder_waiting", "Generation events the broker does not have yet.")
SPOOL_BYTES = Gauge("thumbwheel_recorder_spool_bytes", "Bytes of the generation events on disk.")
APPEND_SECONDS = Histogram(
    "thumbwheel_recorder_append_seconds",
    "Time to put a batch of events on disk, off the event loop.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 5),
)

_BATCH = 256
_IN_MEMORY = 10_000
_ACK_TIMEOUT = 30.0
_BROKER_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_LOOK_SECONDS = 2.0  # between two looks whether the broker has lost its topics, as the collector's relay does
_PASSING = (errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted, errors.NoSpace)
_SCHEMA = GenerationEvent.DESCRIPTOR.full_name.encode()

T = TypeVar("T")

_Recorded = tuple[GenerationEvent, str]
"""An event, and the traceparent of the call that it came of."""


class Recorder:
    """Sends generation events through `spool`. `keep` and `send` are background tasks; `close` comes after them."""

    def __init__(self, log: Log, spool: Spool) -> None:
        self._log, self._spool = log, spool
        self._disk = futures.ThreadPoolExecutor(1, "spool")
        self._memory: deque[_Recorded] = deque()
        self._in_hand = 0  # taken from memory, not on disk yet
        self._arrived, self._kept, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._producer: Producer | None = None
        self._detector = LossDetector(spool.topic_ids)
        self._look_at = 0.0
        self._levels()

    def record(self, event: GenerationEvent) -> None:
        """Takes an event over; it must not be changed any more. Returns at once, whatever disk and broker do."""
        if len(self._memory) >= _IN_MEMORY:
            self._memory.popleft()
            self._dropped(1, "neither disk nor broker keeps up")
        self._memory.append((event, tracing.traceparent()))
        self._idle.clear()
        self._arrived.set()

    async def keep(self) -> None:
        """Background task: from memory to the disk, for ever."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._memory:
                await self._keep([self._memory.popleft() for _ in range(min(_BATCH, len(self._memory)))])

    async def send(self) -> None:
        """Background task: from the disk to the broker, for ever."""
        self._producer = await asyncio.to_thread(self._log.producer)
        try:
            while True:
                self._kept.clear()
                try:
                    if time.monotonic() >= self._look_at:
                        await self._look()
                    while rows := await self._on_disk(lambda: self._spool.read(_BATCH)):
                        await self._publish(rows)
                    self._levels()
                    await self._rest()
                except _PASSING as error:
                    logger.warning("recording waits: %s", error, extra={"waiting": self._waiting})
                    self._look_at = 0.0
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            try:
                await asyncio.to_thread(self._producer.close, _BROKER_SECONDS)
            except errors.ThumbwheelError as error:
                logger.warning("generation events stay on disk: %s", error)

    async def erase(self, doomed: Callable[[GenerationEvent], bool]) -> int:
        """Erases events wherever they are kept here. Returns how many.

        Raises `errors.NoSpace` and `errors.Unavailable`.
        """
        kept = [one for one in self._memory if not doomed(one[0])]
        erased = len(self._memory) - len(kept)
        self._memory = deque(kept)
        # After what is being written now: one thread writes.
        erased += await self._on_disk(
            lambda: self._spool.erase(lambda value: doomed(GenerationEvent.FromString(value)))
        )
        self._levels()
        return erased

    async def flush(self, *, timeout: float) -> None:
        """Waits until the broker has everything. What it does not have in time stays on disk for the next start.

        Raises `errors.DeadlineExceeded` where events did not even reach the disk.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError as error:
            if unkept := len(self._memory) + self._in_hand:
                raise errors.DeadlineExceeded(
                    f"{unkept} generation events reached neither disk nor broker within {timeout:g} s.",
                    remedy="Check the disk of this deployment's home, and the broker.",
                ) from error
            logger.warning("%d generation events stay on disk and are sent at the next start", self._waiting)

    async def close(self) -> None:
        """Closes the spool, once what is being written to it is written."""
        await self._on_disk(self._spool.close)
        self._disk.shutdown()

    @property
    def _waiting(self) -> int:
        return len(self._memory) + self._in_hand + self._spool.waiting

    async def _keep(self, events: Sequence[_Recorded]) -> None:
        self._in_hand = len(events)
        try:
            with APPEND_SECONDS.time():
                self._dropped(await self._on_disk(lambda: self._append(events)), "the spool is full")
        except _PASSING as error:
            logger.error("a batch of generation events goes without the spool: %s", error)
            await self._send_unkept(events)
        finally:
            self._in_hand = 0
            self._levels()
            self._kept.set()

    def _append(self, events: Sequence[_Recorded]) -> int:
        return self._spool.append([_entry(*event) for event in events])

    async def _send_unkept(self, events: Sequence[_Recorded]) -> None:
        """The disk does not take them: straight to the broker, and back to memory where that fails too."""
        rows = [Row(0, *_entry(*event)) for event in events]
        results: Sequence[object] = await self._sent(rows) if self._producer is not None else [None] * len(rows)
        again = [event for event, result in zip(events, results, strict=True) if not isinstance(result, Position)]
        RECORDED.labels("acked").inc(len(events) - len(again))
        if again:
            excess = max(0, len(self._memory) + len(again) - _IN_MEMORY)
            self._memory.extendleft(reversed(again[excess:]))
            self._in_hand = 0
            self._dropped(min(excess, len(again)), "neither disk nor broker keeps up")
            self._arrived.set()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _publish(self, rows: Sequence[Row]) -> None:
        """Sends rows and notes how far the broker has all. Raises the first fault that may pass."""
        done, lost, fault = 0, False, None
        sent = iter(await self._sent([row for row in rows if row.value]))
        for row in rows:
            result = next(sent) if row.value else None
            if result is None:
                pass  # it was erased while it waited
            elif isinstance(result, Position):
                lost |= self._detector.acked(result)
                RECORDED.labels("acked").inc()
            elif isinstance(result, errors.InvalidArgument):
                RECORDED.labels("refused").inc()
                logger.error("the broker refuses generation %s: %s", row.event_id, result)
            elif fault is None:
                fault = result
            # What was acknowledged after a fault is sent again with it: nothing overtakes what it came after.
            if fault is None:
                done = row.id
            else:
                RECORDED.labels("retried").inc()
        if lost:
            await self._rewind()
        elif done:
            await self._on_disk(lambda: self._spool.advance(done))
        self._levels()
        if fault is not None:
            raise fault

    async def _sent(self, rows: Sequence[Row]) -> list[Position | errors.ThumbwheelError]:
        """Where the broker put each, or why it did not. In a thread, so that a long queue drains without a hitch."""
        assert self._producer is not None, "`send` runs"
        return await asyncio.to_thread(_send_all, self._producer, rows)

    async def _look(self) -> None:
        """Whether the broker has lost its topics: also while there is nothing to send. Raises `errors.Unavailable`."""
        ids = await asyncio.to_thread(self._log.topic_ids, [topics.GENERATIONS], _BROKER_SECONDS)
        before = self._detector.topic_ids
        if self._detector.seen(ids):
            await self._rewind()
        if self._detector.topic_ids != before:
            await self._on_disk(lambda: self._spool.keep_topic_ids(self._detector.topic_ids))
        self._look_at = time.monotonic() + _LOOK_SECONDS

    async def _rewind(self) -> None:
        count = await self._on_disk(self._spool.rewind)
        logger.warning("the log was lost: all generations on disk are sent again", extra={"events": count})

    async def _rest(self) -> None:
        """Until something is kept, or it is time to look."""
        try:
            async with asyncio.timeout(max(0.0, self._look_at - time.monotonic())):
                await self._kept.wait()
        except TimeoutError:
            pass

    async def _on_disk(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, action)

    def _dropped(self, count: int, why: str) -> None:
        if count:
            RECORDED.labels("dropped").inc(count)
            logger.error("%s: the %d oldest generation events are dropped", why, count)

    def _levels(self) -> None:
        waiting = self._waiting
        WAITING.set(waiting)
        SPOOL_BYTES.set(self._spool.bytes)
        if waiting == 0:
            self._idle.set()


def _entry(event: GenerationEvent, traceparent: str) -> Entry:
    return Entry(event.event_id, event.generation.prompt_id.encode(), event.SerializeToString(), traceparent)


def _send_all(producer: Producer, rows: Sequence[Row]) -> list[Position | errors.ThumbwheelError]:
    sent = [producer.send(topics.GENERATIONS, row.key, row.value, _headers(row)) for row in rows]
    futures.wait(sent, _ACK_TIMEOUT)
    return [_outcome(future) for future in sent]


def _headers(row: Row) -> Headers:
    headers = (("schema", _SCHEMA), ("event_id", row.event_id.encode()))
    return (*headers, *tracing.as_headers(row.traceparent))


def _outcome(future: futures.Future[Position]) -> Position | errors.ThumbwheelError:
    if not future.done():
        return errors.DeadlineExceeded(f"The broker did not acknowledge a record within {_ACK_TIMEOUT:g} s.")
    try:
        return future.result()
    except errors.ThumbwheelError as error:
        return error
