"""From the outbox to the broker: at least once, in order for each key, whatever happens to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import operator
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from functools import partial

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select

from services.collector import outbox, tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.relay import Relay
from tests.unit.services.collector.parts import eventually
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.log import Headers, Log, Position, Topic
from thumbwheel.stream.memory import MemoryLog, MemoryProducer
from thumbwheel.v1.events_pb2 import ComparisonEvent


async def commit(database: Database, ids: range, keys: int = 3, topic: str = topics.COMPARISONS) -> None:
    """Commits events numbered by their comparison's id."""
    events = [outbox.Event(str(i), topic, f"key-{i % keys}", ComparisonEvent(comparison_id=str(i))) for i in ids]
    await database.write(partial(outbox.add, events=events))


@contextlib.asynccontextmanager
async def running(database: Database, log: Log, settings: CollectorSettings) -> AsyncIterator[Relay]:
    relay = Relay(database, log, settings)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.cancelled(), task.exception()


def arrived(log: MemoryLog, topic: str = topics.COMPARISONS) -> list[tuple[str, int]]:
    """Keys and numbers, in the order of each partition."""
    return [(r.key.decode(), int(ComparisonEvent.FromString(r.value).comparison_id)) for r in log.records(topic)]


async def published(database: Database) -> None:
    async def depth() -> int:
        return (await database.read(outbox.levels)).unpublished

    await eventually(depth, lambda depth: depth == 0)


def in_order(records: list[tuple[str, int]]) -> bool:
    """Whether each key's first sightings are in order."""
    seen: dict[str, list[int]] = {}
    for key, number in records:
        numbers = seen.setdefault(key, [])
        if number not in numbers:
            numbers.append(number)
    return all(numbers == sorted(numbers) for numbers in seen.values())


@given(chosen=st.sets(st.integers(1, 40)))
@settings_of(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_published_is_marked_and_nothing_else(database: Database, chosen: set[int]) -> None:
    def kept(connection: Connection) -> set[int]:
        first = connection.execute(select(func.coalesce(func.max(tables.outbox.c.id), 0))).scalar_one()
        outbox.add(connection, [outbox.Event("", topics.THUMBS, "k", ComparisonEvent()) for _ in range(40)])
        outbox.mark(connection, [first + number for number in chosen], {}, {})
        marked = select(tables.outbox.c.id).where(tables.outbox.c.published_at.is_not(None), tables.outbox.c.id > first)
        return {id - first for (id,) in connection.execute(marked)}

    assert database.write_now(kept) == chosen


async def test_what_is_committed_is_published_once_and_in_order(
    database: Database, log: MemoryLog, settings: CollectorSettings
) -> None:
    await commit(database, range(50))
    async with running(database, log, settings) as relay:
        await published(database)
        await commit(database, range(50, 60))
        relay.wake()
        await published(database)
    records = arrived(log)
    assert sorted(number for _, number in records) == list(range(60))
    assert in_order(records)
    assert [name for name, _ in log.records(topics.COMPARISONS)[0].headers] == ["schema", "event_id"]


async def test_a_commit_wakes_it_at_once(database: Database, log: MemoryLog, settings: CollectorSettings) -> None:
    patient = settings.model_copy(update={"loss_check_seconds": 3_600.0})
    async with running(database, log, patient) as relay:
        for i in range(5):
            await commit(database, range(i, i + 1))
            relay.wake()
            await published(database)
    assert len(arrived(log)) == 5


async def test_a_restart_publishes_what_was_left_and_no_more(
    database: Database, log: MemoryLog, settings: CollectorSettings
) -> None:
    await commit(database, range(5))
    async with running(database, log, settings):
        await published(database)
    await commit(database, range(5, 9))
    async with running(database, log, settings):
        await published(database)
    assert sorted(number for _, number in arrived(log)) == list(range(9))


async def test_while_the_broker_is_away_nothing_is_lost(
    database: Database,
    settings: CollectorSettings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.collector.relay.BROKER_SECONDS", 0.1)

    async def faults() -> int:
        return sum(record.message == "publishing waits" for record in caplog.records)

    log = MemoryLog(delivery_timeout=0.05)
    log.stop()
    await commit(database, range(20))
    async with running(database, log, settings) as relay:
        await commit(database, range(20, 30))
        relay.wake()
        assert (await database.read(outbox.levels)).unpublished == 30
        log.start()
        await published(database)
        # It goes away in the middle as well.
        for i in range(30, 60):
            if i % 10 == 0:
                log.stop()
            await commit(database, range(i, i + 1))
            relay.wake()
            if i % 10 == 5:
                before = await faults()
                await eventually(faults, partial(operator.lt, before))
                log.start()
        await published(database)
    records = arrived(log)
    assert {number for _, number in records} == set(range(60))
    assert in_order(records)
    log.close()


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
async def test_all_is_published_again_when_the_broker_lost_it(
    database: Database, log: MemoryLog, settings: CollectorSettings, idle: bool
) -> None:
    patient = settings if idle else settings.model_copy(update={"loss_check_seconds": 3_600.0})
    await commit(database, range(20))
    async with running(database, log, patient) as relay:
        await published(database)
        log.lose()
        assert arrived(log) == []
        if not idle:  # noticed by the offset of the next acknowledgement
            await commit(database, range(20, 21))
            relay.wake()
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) >= 20 + (not idle))
        await published(database)
    records = arrived(log)
    assert {number for _, number in records} == set(range(20 if idle else 21))


async def test_a_loss_that_could_not_be_written_down_is_not_forgotten(
    database: Database, log: MemoryLog, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    republish, faults = outbox.republish, [errors.Unavailable("The database is away."), errors.NoSpace("It is full.")]

    def failing(connection: Connection, ids: dict[str, str]) -> int:
        if faults:
            raise faults.pop()
        return republish(connection, ids)

    monkeypatch.setattr(outbox, "republish", failing)
    await commit(database, range(20))
    async with running(database, log, settings):
        await published(database)
        log.lose()
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) >= 20)
        await published(database)
    assert not faults
    assert in_order(arrived(log))


class Fenced(MemoryLog):
    """Says when topics are made, and how many producers are open then."""

    def __init__(self) -> None:
        super().__init__()
        self.open_when_made: list[int] = []
        self.opened: list[MemoryProducer] = []

    def producer(self) -> MemoryProducer:
        self.opened.append(super().producer())
        return self.opened[-1]

    def ensure_topics(self, topics: Iterable[Topic], timeout: float) -> None:
        self.open_when_made.append(sum(not producer._closed for producer in self.opened))
        super().ensure_topics(topics, timeout)


async def test_topics_are_made_anew_only_when_nothing_is_on_its_way_to_them(
    database: Database, settings: CollectorSettings
) -> None:
    log = Fenced()
    await commit(database, range(20))
    async with running(database, log, settings):
        await published(database)
        log.lose()
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) == 20)
    assert log.open_when_made == [0, 0]
    assert in_order(arrived(log))
    log.close()


async def test_a_loss_while_it_was_down_is_noticed_at_the_start(
    database: Database, log: MemoryLog, settings: CollectorSettings
) -> None:
    await commit(database, range(20))
    async with running(database, log, settings):
        await published(database)
    log.lose()
    async with running(database, log, settings):
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) >= 20)
        await published(database)
    assert sorted(number for _, number in arrived(log)) == list(range(20))


async def test_a_topic_that_is_shorter_than_before_is_filled_again(
    database: Database, log: MemoryLog, settings: CollectorSettings
) -> None:
    await commit(database, range(20))
    async with running(database, log, settings):
        await published(database)
    for partition in log._topics[topics.COMPARISONS].partitions:  # an unclean failover: the same topic, cut short
        del partition.records[2:]
    async with running(database, log, settings):
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) >= 20)
        await published(database)
    assert {number for _, number in arrived(log)} == set(range(20))


class Choosy(MemoryLog):
    """A broker that refuses some records for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0

    def producer(self) -> MemoryProducer:
        log = self

        class Producer(MemoryProducer):
            def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
                if ComparisonEvent.FromString(value).comparison_id == "3":
                    log.attempts += 1
                    refused: Future[Position] = Future()
                    refused.set_exception(errors.InvalidArgument("is too large.", field="value"))
                    return refused
                return super().send(topic, key, value, headers)

        return Producer(self)


async def test_what_the_broker_will_never_take_blocks_nothing(database: Database, settings: CollectorSettings) -> None:
    log = Choosy()
    await commit(database, range(8), keys=1)
    async with running(database, log, settings):
        await published(database)
    assert [number for _, number in arrived(log)] == [0, 1, 2, 4, 5, 6, 7]
    refused = await database.read(
        lambda c: c.exec_driver_sql("select event_id, refused from outbox where refused is not null").all()
    )
    assert [tuple(row) for row in refused] == [("3", "value: is too large.")]
    log.lose()
    async with running(database, log, settings):
        await eventually(lambda: asyncio.to_thread(arrived, log), lambda records: len(records) == 7)
    assert log.attempts == 1


async def test_a_fault_of_its_own_ends_it(
    database: Database, log: MemoryLog, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(log, "topic_ids", broken)
    with pytest.raises(AttributeError, match="a bug"):
        await asyncio.wait_for(Relay(database, log, settings).run(), 10)
