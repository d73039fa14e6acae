"""Recording generations on the stream, never in the way of serving.

`record` only appends; a background task sends in order, tries again while the broker is away, and sends what it still
remembers once more when the log turns out to have been lost. Consumers drop ids they have seen.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from prometheus_client import Counter, Gauge

from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.aio import acked
from thumbwheel.stream.log import Log, LossDetector, Producer
from thumbwheel.v1.events_pb2 import GenerationEvent

logger = logging.getLogger(__name__)

RECORDED = Counter("thumbwheel_recorder_events_total", "Generation events, by what became of them.", ["outcome"])
WAITING = Gauge("thumbwheel_recorder_waiting", "Generation events the broker does not have yet.")

_BATCH = 256
_ACK_TIMEOUT = 30.0
_RETRY_SECONDS = 1.0


class Recorder:
    """Sends generation events. Keeps the last `capacity`; past that the oldest unsent are dropped, and counted."""

    def __init__(self, log: Log, *, capacity: int) -> None:
        self._log = log
        self._capacity = capacity
        self._waiting: deque[GenerationEvent] = deque()
        self._recent: deque[GenerationEvent] = deque(maxlen=capacity)
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._detector = LossDetector()

    def record(self, event: GenerationEvent) -> None:
        """Takes an event over. Returns at once."""
        self._recent.append(event)
        self._queue(event)

    def _queue(self, event: GenerationEvent) -> None:
        if len(self._waiting) >= self._capacity:
            self._waiting.popleft()
            RECORDED.labels("dropped").inc()
            logger.error("the broker is away and %d events wait: the oldest is dropped", self._capacity)
        self._waiting.append(event)
        WAITING.set(len(self._waiting))
        self._idle.clear()
        self._wake.set()

    async def run(self) -> None:
        """Background task: sends for ever."""
        producer = self._log.producer()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self._send(producer)
                self._idle.set()
        finally:
            await asyncio.to_thread(producer.close, 5.0)

    async def flush(self, *, timeout: float) -> None:
        """Waits until the broker has everything. Raises `errors.DeadlineExceeded` saying how much it has not."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"{len(self._waiting)} generation events did not reach the broker within {timeout:g} s."
            ) from error

    async def _send(self, producer: Producer) -> None:
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        futures = [
            producer.send(
                topics.GENERATIONS,
                event.generation.prompt_id.encode(),
                event.SerializeToString(),
                (("schema", event.DESCRIPTOR.full_name.encode()), ("event_id", event.event_id.encode())),
            )
            for event in batch
        ]
        results = await asyncio.gather(*(acked(future, _ACK_TIMEOUT) for future in futures), return_exceptions=True)
        failed, lost = [], False
        for event, result in zip(batch, results, strict=True):
            if isinstance(result, errors.ThumbwheelError):
                failed.append(event)
                RECORDED.labels("retried").inc()
            elif isinstance(result, BaseException):
                raise result
            else:
                RECORDED.labels("acked").inc()
                lost = self._detector.acked(result) or lost
        if lost:
            logger.warning("the log was lost: %d remembered generations are sent again", len(self._recent))
            self._waiting = deque(self._recent)
        elif failed:
            self._waiting.extendleft(reversed(failed))
            await asyncio.sleep(_RETRY_SECONDS)
        WAITING.set(len(self._waiting))
