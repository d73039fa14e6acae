"""Generations reach the stream: in order, through outages, restarts and full disks, and never hold up serving."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
from opentelemetry import trace

from services.policy import recording
from services.policy.recording import Recorder
from services.policy.spool import Entry, Spool
from tests.support import until
from thumbwheel import errors, tracing
from thumbwheel.stream import topics
from thumbwheel.stream.log import Headers, Position
from thumbwheel.stream.memory import MemoryLog, MemoryProducer
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import Generation


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_LOOK_SECONDS": 0.02, "_RETRY_SECONDS": 0.02, "_BROKER_SECONDS": 0.1}.items():
        monkeypatch.setattr(recording, name, seconds)


@pytest.fixture
def log() -> MemoryLog:
    log = MemoryLog(delivery_timeout=0.2)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    return log


def _event(number: int) -> GenerationEvent:
    return GenerationEvent(event_id=f"e{number}", generation=Generation(prompt_id="p", text="x" * 100))


def _arrived(log: MemoryLog) -> list[str]:
    return [GenerationEvent.FromString(record.value).event_id for record in log.records(topics.GENERATIONS)]


def _count(outcome: str) -> float:
    return recording.RECORDED.labels(outcome)._value.get()  # type: ignore[no-any-return]  # its stubs do not say


@contextlib.asynccontextmanager
async def running(log: MemoryLog, spool: Spool) -> AsyncIterator[Recorder]:
    """A recorder at work, stopped as a service stops it, less the wait for the broker."""
    recorder = Recorder(log, spool)
    tasks = [asyncio.create_task(recorder.keep()), asyncio.create_task(recorder.send())]
    try:
        yield recorder
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await recorder.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


def _spool(tmp_path: Path, limit: int = 10**6) -> Spool:
    return Spool(tmp_path / "spool.db", limit=limit)


async def test_events_arrive_in_order_with_their_headers(log: MemoryLog, tmp_path: Path) -> None:
    async with running(log, _spool(tmp_path)) as recorder:
        for number in range(1000):
            recorder.record(_event(number))
        await recorder.flush(timeout=10)
        assert _arrived(log) == [f"e{number}" for number in range(1000)]
        first = log.records(topics.GENERATIONS)[0]
    assert first.key == b"p"
    assert first.headers == (("schema", b"thumbwheel.v1.GenerationEvent"), ("event_id", b"e0"))
    assert GenerationEvent.FromString(first.value) == _event(0)


async def test_an_event_carries_the_trace_of_the_call_it_came_of(log: MemoryLog, tmp_path: Path) -> None:
    carried = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(log, _spool(tmp_path)) as recorder:
        with trace.use_span(tracing.begin_call("/a.B/C", carried) or trace.INVALID_SPAN):
            recorder.record(_event(0))
        await recorder.flush(timeout=10)
        assert log.records(topics.GENERATIONS)[0].headers[-1] == ("traceparent", carried.encode())


async def test_an_outage_is_waited_out_on_disk_also_through_a_restart(log: MemoryLog, tmp_path: Path) -> None:
    log.stop()
    async with running(log, _spool(tmp_path)) as recorder:
        for number in range(300):
            recorder.record(_event(number))
        await recorder.flush(timeout=0.3)  # says what stays behind, and is no error
    spool = _spool(tmp_path)
    assert spool.waiting == 300
    async with running(log, spool) as recorder:
        recorder.record(_event(300))
        log.start()
        await recorder.flush(timeout=10)
        once = list(dict.fromkeys(_arrived(log)))
        assert once == [f"e{number}" for number in range(301)]
        assert spool.waiting == 0


async def test_a_loss_is_seen_while_nothing_is_recorded(log: MemoryLog, tmp_path: Path) -> None:
    async with running(log, _spool(tmp_path)) as recorder:
        for number in range(5):
            recorder.record(_event(number))
        await recorder.flush(timeout=10)
        await asyncio.sleep(0)
        log.lose()

        async def again() -> bool:
            return _arrived(log) == [f"e{number}" for number in range(5)]

        await until(again, timeout=10, every=0.01)


async def test_a_loss_between_two_runs_is_seen(log: MemoryLog, tmp_path: Path) -> None:
    async with running(log, _spool(tmp_path)) as recorder:
        recorder.record(_event(1))
        await recorder.flush(timeout=10)
    log.lose()
    async with running(log, _spool(tmp_path)) as recorder:

        async def again() -> bool:
            return _arrived(log) == ["e1"]

        await until(again, timeout=10, every=0.01)


async def test_a_full_spool_drops_the_oldest_and_counts_them(log: MemoryLog, tmp_path: Path) -> None:
    log.stop()
    before = _count("dropped")
    entry = 64 + 1 + len(_event(100).SerializeToString())
    async with running(log, _spool(tmp_path, limit=50 * entry)) as recorder:
        for number in range(100, 180):
            recorder.record(_event(number))

        async def kept() -> bool:
            return not recorder._memory and not recorder._in_hand

        await until(kept, timeout=10, every=0.01)
        log.start()
        await recorder.flush(timeout=10)
        # The first few may have been handed to the broker's client before they were dropped.
        assert [each for each in _arrived(log) if int(each[1:]) >= 130] == [f"e{n}" for n in range(130, 180)]
    assert _count("dropped") - before == 30


async def test_a_slow_disk_holds_up_nothing(log: MemoryLog, tmp_path: Path) -> None:
    """While the disk hangs, `record` returns and the event loop turns; when it goes on, all arrive."""
    hanging, go_on = threading.Event(), threading.Event()

    class Slow(Spool):
        def append(self, entries: Sequence[Entry]) -> int:
            hanging.set()
            assert go_on.wait(30)
            return super().append(entries)

    async with running(log, Slow(tmp_path / "spool.db", limit=10**6)) as recorder:
        recorder.record(_event(0))
        assert await asyncio.to_thread(hanging.wait, 10)
        for number in range(1, 2000):
            recorder.record(_event(number))
        for _ in range(100):
            await asyncio.sleep(0)
        assert _arrived(log) == []
        go_on.set()
        await recorder.flush(timeout=20)
        assert _arrived(log) == [f"e{number}" for number in range(2000)]


async def test_where_the_disk_fails_events_go_straight_to_the_broker(log: MemoryLog, tmp_path: Path) -> None:
    class Full(Spool):
        def append(self, entries: Sequence[Entry]) -> int:
            raise errors.NoSpace("The disk is full.")

    log.stop()
    async with running(log, Full(tmp_path / "spool.db", limit=10**6)) as recorder:
        recorder.record(_event(1))
        recorder.record(_event(2))
        with pytest.raises(errors.DeadlineExceeded, match="2 generation events reached neither disk nor broker"):
            await recorder.flush(timeout=0.5)
        log.start()
        await recorder.flush(timeout=10)
        assert list(dict.fromkeys(_arrived(log))) == ["e1", "e2"]


async def test_an_event_the_broker_never_takes_does_not_block_the_rest(log: MemoryLog, tmp_path: Path) -> None:
    class Picky(MemoryProducer):
        def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
            if b"e2" in value:
                refused: Future[Position] = Future()
                refused.set_exception(errors.InvalidArgument("A record is too large.", field="value"))
                return refused
            return super().send(topic, key, value, headers)

    log.producer = lambda: Picky(log)  # type: ignore[method-assign]
    before = _count("refused")
    spool = _spool(tmp_path)
    async with running(log, spool) as recorder:
        for number in (1, 2, 3):
            recorder.record(_event(number))
        await recorder.flush(timeout=10)
        assert _arrived(log) == ["e1", "e3"]
        assert spool.waiting == 0
    assert _count("refused") - before == 1


async def test_what_comes_after_a_fault_is_sent_again_behind_it(log: MemoryLog, tmp_path: Path) -> None:
    failures = 1

    class Flaky(MemoryProducer):
        def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
            nonlocal failures
            if b"e2" in value and failures:
                failures -= 1
                failed: Future[Position] = Future()
                failed.set_exception(errors.Unavailable("Not now."))
                return failed
            return super().send(topic, key, value, headers)

    log.producer = lambda: Flaky(log)  # type: ignore[method-assign]
    async with running(log, _spool(tmp_path)) as recorder:
        for number in (1, 2, 3):
            recorder.record(_event(number))
        await recorder.flush(timeout=10)
    assert _arrived(log) == ["e1", "e3", "e2", "e3"]
