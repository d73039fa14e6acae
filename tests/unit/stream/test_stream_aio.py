from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from thumbwheel import errors
from thumbwheel.stream.aio import acked, records
from thumbwheel.stream.log import Position, Record, Topic, TopicPartition
from thumbwheel.stream.memory import MemoryConsumer, MemoryLog

TP = TopicPartition("t", 0)


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog()
    made.ensure_topics([Topic("t")], 1.0)
    return made


async def test_batches_come_in_order_and_positions_are_those_of_the_last(log: MemoryLog) -> None:
    for n in range(7):
        log.producer().send("t", b"k", b"%d" % n)
    consumer = log.consumer(["t"], group="g")
    seen: list[list[bytes]] = []
    reading = records(consumer, max_records=3)
    async for batch in reading:
        seen.append([r.value for r in batch])
        assert consumer.positions() == {TP: batch[-1].offset + 1}
        if len(seen) == 3:
            break
    await reading.aclose()
    assert seen == [[b"0", b"1", b"2"], [b"3", b"4", b"5"], [b"6"]]


async def test_the_event_loop_runs_while_a_poll_waits(log: MemoryLog) -> None:
    reading = records(log.consumer(["t"], group="g"), poll_timeout=10.0)
    waiting = asyncio.ensure_future(anext(reading))
    await asyncio.to_thread(lambda: log.producer().send("t", b"k", b"v").result(1))
    batch = await asyncio.wait_for(waiting, 5.0)
    assert [r.value for r in batch] == [b"v"]
    await reading.aclose()


async def test_what_a_cancelled_poll_has_read_is_put_back(log: MemoryLog) -> None:
    consumer, polling, go_on = log.consumer(["t"], group="g"), threading.Event(), threading.Event()

    class Slow:
        """Is cancelled after it has read and before it has told."""

        def poll(self, timeout: float, max_records: int) -> Sequence[Record]:
            batch = consumer.poll(timeout, max_records)
            polling.set()
            assert go_on.wait(10)
            return batch

        def __getattr__(self, name: str) -> object:
            return getattr(consumer, name)

    log.producer().send("t", b"k", b"0")
    log.producer().send("t", b"k", b"1")
    waiting = asyncio.ensure_future(anext(records(Slow())))  # type: ignore[arg-type]  # delegates the rest
    assert await asyncio.to_thread(polling.wait, 10)
    assert consumer.positions() == {TP: 2}
    waiting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert consumer.positions() == {TP: 0}


async def test_an_error_of_the_log_reaches_the_reader(log: MemoryLog) -> None:
    consumer: MemoryConsumer = log.consumer(["t"], group="g")
    consumer.close()
    with pytest.raises(errors.FailedPrecondition):
        await anext(records(consumer))


async def test_an_acknowledgement_is_awaited_and_its_failure_raised() -> None:
    fine: Future[Position] = Future()
    fine.set_result(Position("t", 0, 3))
    assert await acked(fine, 1.0) == Position("t", 0, 3)
    failed: Future[Position] = Future()
    failed.set_exception(errors.Unavailable("away"))
    with pytest.raises(errors.Unavailable, match="away"):
        await acked(failed, 1.0)


async def test_a_late_acknowledgement_is_not_waited_for(log: MemoryLog) -> None:
    log.stop()
    future = log.producer().send("t", b"k", b"v")
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="same id"):
        await acked(future, 0.05)
    assert time.monotonic() - began < 5.0
    log.start()
    assert future.result(0) == Position("t", 0, 0)
