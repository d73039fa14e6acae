"""The log from asyncio: the log's calls block, so reading has a thread of its own and acknowledgements are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from thumbwheel import errors
from thumbwheel.stream.log import Consumer, Position, Record, TopicPartition

_GRACE_SECONDS = 1.0


async def records(
    consumer: Consumer, *, max_records: int = 500, poll_timeout: float = 0.5
) -> AsyncGenerator[Sequence[Record], None]:
    """Yields batches of records, each of at least one, for ever.

    Nothing is read ahead: between two batches the consumer rests, its `positions` are those after the batch last
    yielded, and the caller may use it (`await asyncio.to_thread(consumer.commit, ...)`). On cancellation the poll under
    way is waited for, at most `poll_timeout` seconds, and what it read is put back, so that no record is passed over by
    whoever reads on. The consumer stays open.
    """
    executor = ThreadPoolExecutor(1, "stream-reader")
    try:
        while True:
            polling = executor.submit(consumer.poll, poll_timeout, max_records)
            try:
                batch = await asyncio.wrap_future(polling)
            except asyncio.CancelledError:
                if not polling.cancelled():
                    # In the same thread, behind the poll; without holding up the event loop.
                    put_back = executor.submit(_put_back, consumer, polling)
                    await asyncio.wait([asyncio.wrap_future(put_back)], timeout=poll_timeout + _GRACE_SECONDS)
                raise
            if batch:
                yield batch
    finally:
        executor.shutdown(wait=False)


def _put_back(consumer: Consumer, polling: Future[Sequence[Record]]) -> None:
    first: dict[TopicPartition, int] = {}
    for record in polling.result():
        first.setdefault(TopicPartition(record.topic, record.partition), record.offset)
    consumer.seek(first)


async def acked(future: Future[Position], timeout: float) -> Position:
    """Waits for the broker's acknowledgement of a record that was sent.

    Raises what the future failed with, and `errors.DeadlineExceeded` after `timeout` seconds: whether the record was
    written is then unknown. Cancelling the wait does not recall the record.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"The broker did not acknowledge a record within {timeout:g} s.",
            remedy="It may have been written: send it again under the same id.",
        ) from None
