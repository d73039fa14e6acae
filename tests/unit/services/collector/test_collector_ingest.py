"""From the broker to the record: each generation exactly once, each bad record to the dead letters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Connection, func, select

from services.collector import outbox, tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.ingest import Ingest
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment, curator_of, eventually
from thumbwheel import errors
from thumbwheel.stream import deadletter, topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import DeadLetter, GenerationEvent


@contextlib.asynccontextmanager
async def running(
    database: Database, log: MemoryLog, settings: CollectorSettings, committed: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    task = asyncio.create_task(Ingest(database, log, settings, curator_of(database), committed).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.cancelled(), task.exception()


def publish(log: MemoryLog, *events: GenerationEvent) -> None:
    for event in events:
        log.producer().send(topics.GENERATIONS, event.generation.prompt_id.encode(), event.SerializeToString())


async def stored(database: Database) -> dict[str, GenerationEvent]:
    found = select(tables.generations.c.generation_id, tables.generations.c.event)

    def read(connection: Connection) -> dict[str, GenerationEvent]:
        return {id: GenerationEvent.FromString(event) for id, event in connection.execute(found)}

    return await database.read(read)


async def consumed(database: Database) -> int:
    """Records behind the positions that are kept."""
    return sum((await database.read(partial(outbox.load_positions, topics=[topics.GENERATIONS]))).values())


async def test_generations_are_stored_whole_and_wake_the_relay(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    events = [deployment.generation(f"text {i}") for i in range(5)]
    publish(log, *events)
    woken = asyncio.Event()
    async with running(database, log, settings, woken.set):
        await asyncio.wait_for(woken.wait(), 10)
        found = await eventually(partial(stored, database), lambda found: len(found) == 5)
    assert found == {event.event_id: event for event in events}


async def test_what_is_generated_in_bulk_is_passed_by(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    rollout, shown = deployment.generation("rollout"), deployment.generation("shown")
    rollout.bulk = True

    async def counted() -> float:
        return REGISTRY.get_sample_value("thumbwheel_collector_generations_total") or 0.0

    before = await counted()
    publish(log, rollout, shown, rollout)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 3)
        await eventually(counted, lambda count: count > before)  # after the commit
    assert await stored(database) == {shown.event_id: shown}
    assert await counted() == before + 1, "the vote rate's base"


async def test_late_generations_join_what_was_held(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    a, b = deployment.pair()
    await deployment.submit(database, parts.comparison(a, b))
    async with running(database, log, settings):
        publish(log, a, b)
        await eventually(lambda: database.read(outbox.levels), lambda levels: levels.held == 0)
    waiting = await database.read(partial(outbox.waiting, limit=10))
    assert [row.topic for row in waiting] == [topics.FEEDBACK, topics.FEEDBACK, topics.COMPARISONS]


async def test_a_restart_goes_on_where_it_stopped(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    publish(log, *(deployment.generation() for _ in range(5)))
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 5)
    await database.write(lambda c: c.execute(tables.generations.delete()).close())
    later = [deployment.generation() for _ in range(3)]
    publish(log, *later)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 8)
    assert set(await stored(database)) == {event.event_id for event in later}, "what was read is not read again"


async def test_after_a_lost_log_it_reads_the_new_one_from_its_start(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    old = [deployment.generation() for _ in range(3)]
    publish(log, *old)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 3)
    log.lose()
    new = [deployment.generation() for _ in range(10)]
    publish(log, *new)
    async with running(database, log, settings):
        await eventually(partial(stored, database), lambda found: len(found) == 13)


async def test_a_record_that_cannot_be_used_goes_to_the_dead_letters(
    database: Database, log: MemoryLog, settings: CollectorSettings, deployment: Deployment
) -> None:
    nameless = deployment.generation()
    nameless.generation.ClearField("generation_id")
    unequal = deployment.generation()
    del unequal.generation.logprobs[1:]
    bad = [b"\xff\xff no message", b"", nameless.SerializeToString(), unequal.SerializeToString()]
    good = deployment.generation()
    producer = log.producer()
    for value in bad:
        producer.send(topics.GENERATIONS, b"one key", value, (("origin", b"test"),))
    producer.send(topics.GENERATIONS, b"one key", b"x", (("schema", b"thumbwheel.v1.DeadLetter"),))
    publish(log, good)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 6)
    assert list(await stored(database)) == [good.event_id]
    letters = [DeadLetter.FromString(row.value) for row in await database.read(partial(outbox.waiting, limit=10))]
    assert [(letter.topic, letter.consumer, letter.key) for letter in letters] == [
        (topics.GENERATIONS, "collector", b"one key")
    ] * 5
    assert [letter.value for letter in letters] == [*bad, b"x"]
    assert [letter.offset for letter in letters] == sorted(letter.offset for letter in letters)
    assert (letters[0].headers[0].key, letters[0].headers[0].value) == ("origin", b"test")
    for letter, reason in zip(letters, ["not a", "empty", "generation_id", "logprobs", "DeadLetter"], strict=True):
        assert reason in letter.reason


async def test_a_dead_letter_fits_into_a_record(
    database: Database, log: MemoryLog, settings: CollectorSettings
) -> None:
    long = b"\xff" * (deadletter.MAX_VALUE_BYTES + 1)
    log.producer().send(topics.GENERATIONS, b"k", long)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 1)
    [row] = await database.read(partial(outbox.waiting, limit=10))
    letter = DeadLetter.FromString(row.value)
    assert len(letter.value) == deadletter.MAX_VALUE_BYTES
    assert f"of {len(long)} bytes kept" in letter.reason


async def test_a_full_disk_delays_and_loses_nothing(
    database: Database,
    log: MemoryLog,
    settings: CollectorSettings,
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = database.write
    faults: list[int] = []

    async def full(work: Callable[[Connection], object]) -> object:
        if len(faults) < 3:
            faults.append(1)
            raise errors.NoSpace("The disk is full.", remedy="Free space.")
        return await write(work)

    monkeypatch.setattr(database, "write", full)
    a, b = deployment.pair()
    publish(log, a, b)
    async with running(database, log, settings):
        await eventually(partial(consumed, database), lambda count: count == 2)
    assert len(faults) == 3
    count = select(func.count()).select_from(tables.generations)
    assert await database.read(lambda c: c.execute(count).scalar_one()) == 2
