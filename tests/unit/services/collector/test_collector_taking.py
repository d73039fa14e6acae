"""The second stage: what was acknowledged is recorded once, in its order, whoever dies in between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection

from services.collector import clerk as clerks
from services.collector import inbox, intake, outbox, tables
from services.collector.acknowledge import Acknowledged, Incoming, acknowledge
from services.collector.admitting import Admitting, Offer
from services.collector.clerk import Clerk, TakingProcess
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.door import Door
from services.collector.records import Recorded
from services.collector.rights import erasure
from services.collector.rules import Rules
from services.collector.submission import Checker
from services.collector.taking import AT_ONCE, Order, Taking
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import A, B, Deployment, eventually, store
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.v1.preference_pb2 import Feedback


def acked(database: Database, deployment: Deployment, pieces: Sequence[Feedback]) -> list[str]:
    """The ids with which these are acknowledged, in one commit."""
    checker = Checker(deployment.key, 1_000)
    incoming = [Incoming(checker.check(one, tenant="default")) for one in pieces]
    results = database.write_inbox_now(lambda connection: acknowledge(connection, incoming))
    assert all(isinstance(one, Acknowledged) for one in results), results
    return [one.feedback_id for one in results if isinstance(one, Acknowledged)]


def waiting(database: Database) -> list[str]:
    return [row.feedback_id for row in database.read_now(partial(inbox.oldest, limit=1_000))]


def recorded(database: Database) -> dict[str, str]:
    """The states of all feedback, in the order of recording."""
    rows = database.read_now(lambda c: c.execute(tables.feedback.select().order_by(tables.feedback.c.user_rank)).all())
    return {row.feedback_id: row.state for row in rows}


def drop(database: Database, ids: Sequence[str]) -> None:
    database.write_inbox_now(partial(inbox.drop, ids=ids))


async def test_rows_are_recorded_in_their_order_and_told_of(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    late = deployment.pair()
    pieces = [parts.comparison(a, b, A), parts.comparison(a, b, B), parts.comment(a, "hm"), parts.comparison(*late)]
    ids = acked(database, deployment, pieces)
    taking = Taking(database, Rules())
    first = taking.take(2)
    assert (len(first.ids), list(first.told)) == (2, [("comparison", "ACCEPTED", 2)])
    drop(database, first.ids)
    second = taking.take(64)
    assert list(second.told) == [("comment", "RECORDED", 1), ("comparison", "HELD", 1)]
    drop(database, second.ids)
    assert taking.take(64).ids == []
    assert recorded(database) == dict(zip(ids, ["SUPERSEDED", "ACCEPTED", "RECORDED", "HELD"], strict=True))


async def test_a_row_that_was_recorded_and_not_dropped_is_passed_over(
    database: Database, deployment: Deployment
) -> None:
    """Its process died in between, or another collector was faster."""
    event = deployment.generation()
    await store(database, event)
    ids = acked(database, deployment, [parts.comment(event, str(i)) for i in range(5)])
    Taking(database, Rules()).take(3)
    again = Taking(database, Rules())
    taken = again.take(64)
    assert (len(taken.ids), list(taken.told)) == (5, [("comment", "RECORDED", 2)])
    drop(database, taken.ids)
    assert waiting(database) == []
    assert list(recorded(database)) == ids
    assert (await database.read(outbox.levels)).unpublished == 5


async def test_what_is_recorded_together_is_told_of_in_its_order(database: Database, deployment: Deployment) -> None:
    """Of a prompt, what was acknowledged first is published first, whatever becomes of it."""
    a, b = deployment.pair()
    await store(database, a, b)
    pieces = [
        parts.comparison(a, b),
        parts.comment(a, "hm"),
        parts.thumb(a, user="bob"),
        parts.comment(b, "oh", user="bob"),
        parts.comparison(a, deployment.generation("not yet", a.generation.prompt_id)),
        parts.edit(b, "better", user="cyd"),
    ]
    ids = acked(database, deployment, pieces)
    Taking(database, Rules()).drain()
    rows = await database.read(partial(outbox.waiting, limit=100))
    told = parts.feedback_records([row.value for row in rows if row.topic == topics.FEEDBACK])
    assert [record.feedback_id for record in told][: len(ids)] == ids


async def test_dropping_late_takes_out_nothing_that_came_since(database: Database, deployment: Deployment) -> None:
    """SQLite numbers the rows of a table that was emptied from 1 again."""
    event = deployment.generation()
    await store(database, event)
    acked(database, deployment, [parts.comment(event, "first")])
    first = Taking(database, Rules()).take(64)
    drop(database, first.ids)
    [later] = acked(database, deployment, [parts.comment(event, "later")])
    drop(database, first.ids)
    assert waiting(database) == [later]


async def test_what_a_forgotten_user_said_is_not_recorded(database: Database, deployment: Deployment) -> None:
    event = deployment.generation()
    await store(database, event)
    acked(database, deployment, [parts.comment(event, "of ann", user="ann")])
    [kept] = acked(database, deployment, [parts.comment(event, "of bob", user="bob")])
    await database.write(partial(erasure.forget, rules=Rules(), tenant="default", user_id="ann"))
    Taking(database, Rules()).drain()
    assert list(recorded(database)) == [kept]
    assert waiting(database) == []


async def test_what_cannot_be_recorded_holds_up_nobody_and_is_kept(
    database: Database, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = deployment.generation()
    await store(database, event)
    ids = acked(database, deployment, [parts.comment(event, str(i)) for i in range(4)])
    take = intake.take

    def fails(connection: Connection, rows: Sequence[inbox.Waiting], curator: intake.Curator) -> list[Recorded]:
        if ids[1] in [row.feedback_id for row in rows]:
            raise ZeroDivisionError
        return take(connection, rows, curator)

    with monkeypatch.context() as patched:
        patched.setattr(intake, "take", fails)
        Taking(database, Rules()).drain()
    assert list(recorded(database)) == [ids[0], *ids[2:]]
    assert waiting(database) == [ids[1]]
    Taking(database, Rules()).drain()
    assert list(recorded(database)) == [ids[0], *ids[2:], ids[1]]


async def test_taken_many_or_one_at_a_time_it_comes_to_the_same(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    prompt_id = parts.new_id()
    one, two, three = (deployment.generation(text, prompt_id) for text in ("one", "two", "three"))
    pieces = [
        parts.comparison(one, two, user="ann"),
        parts.comparison(two, three, user="bob"),
        parts.comparison(three, one, user="cyd"),  # closes a cycle
        parts.comparison(one, two, B, user="ann"),
        parts.edit(one, "better", user="ann"),
        parts.thumb(one, user="dan"),
    ]
    again = Database(f"sqlite:///{tmp_path / 'again.db'}")
    try:
        acked(database, deployment, pieces)
        rows = database.read_now(partial(inbox.oldest, limit=10))
        again.write_inbox_now(partial(inbox.put, rows=rows))
        for into in (database, again):
            await store(into, one, two, three)
        drop(database, Taking(database, Rules()).take(64).ids)
        slowly = Taking(again, Rules())
        for _ in pieces:
            drop(again, slowly.take(1).ids)
        assert recorded(database) == recorded(again)
        assert len(recorded(again)) == len(pieces)
    finally:
        again.close()


@pytest.fixture
def hand(settings: CollectorSettings) -> Iterator[TakingProcess]:
    """The real process."""
    process = TakingProcess(Order(settings.database_url, Rules(), "info"))
    yield process
    process.close()


@pytest.fixture
async def door(database: Database, deployment: Deployment) -> AsyncIterator[Door]:
    door = Door(Admitting(database, Checker(deployment.key, 1_000)))
    yield door
    await door.close()


async def test_a_process_records_and_is_started_again_when_it_dies(
    database: Database, deployment: Deployment, door: Door, hand: TakingProcess
) -> None:
    event = deployment.generation()
    await store(database, event)
    woken: list[bool] = []
    clerk = Clerk(database, door, hand, lambda: woken.append(True), 0.05)
    working = asyncio.create_task(clerk.run())
    ids = []
    for number in range(60):
        offer = Offer("default", parts.comment(event, str(number)).SerializeToString())
        ids.append((await door.admit(offer)).feedback_id)
        clerk.wake()
        if number in (20, 40):
            await eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
            assert hand.pid is not None
            os.kill(hand.pid, signal.SIGKILL)
    await eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
    assert list(recorded(database)) == ids
    assert (await database.read(outbox.levels)).unpublished == 60
    assert woken
    working.cancel()
    await asyncio.wait([working])
    assert working.cancelled(), working.exception()
    assert hand.pid is None, "it ends with the clerk"


async def test_who_waits_for_what_gathers_does_not_wait_until_it_has(
    database: Database, deployment: Deployment, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clerks, "_GATHER_SECONDS", 60.0)
    clerk = Clerk(database, door, Taking(database, Rules()), lambda: None, 0.05)
    working = asyncio.create_task(clerk.run())
    for _ in range(2):
        made = await door.admit(Offer("default", parts.comment(deployment.generation(), "x").SerializeToString()))
        clerk.wake()
        await clerk.settled(partial(inbox.holds, tenant="default", feedback_id=made.feedback_id), 10.0)
    assert len(recorded(database)) == 2
    working.cancel()
    await asyncio.wait([working])


class Crowd:
    """A door at which somebody always is."""

    def __init__(self, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = asyncio.Event()
        self._looks = 0
        monkeypatch.setattr(door, "quiet_in", self._quiet_in)

    def _quiet_in(self) -> float:
        self._looks += 1
        if self._looks == 5:
            self.asked.set()
        return 0.001


@pytest.mark.parametrize("hurried", [False, True])
async def test_recording_gives_way_to_acknowledging_unless_somebody_waits(
    database: Database, deployment: Deployment, door: Door, monkeypatch: pytest.MonkeyPatch, hurried: bool
) -> None:
    monkeypatch.setattr(clerks, "_GIVE_WAY_SECONDS", 60.0)
    crowd = Crowd(door, monkeypatch)
    clerk = Clerk(database, door, Taking(database, Rules()), lambda: None, 0.05)
    made = await door.admit(Offer("default", parts.comment(deployment.generation(), "x").SerializeToString()))
    clerk.wake()
    working = asyncio.create_task(clerk.run())
    await asyncio.wait_for(crowd.asked.wait(), 10)
    assert waiting(database) == [made.feedback_id]
    if hurried:
        await clerk.settled(partial(inbox.holds, tenant="default", feedback_id=made.feedback_id), 10.0)
    else:
        monkeypatch.setattr(door, "quiet_in", lambda: 0.0)
        await eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
    assert list(recorded(database)) == [made.feedback_id]
    working.cancel()
    await asyncio.wait([working])


async def test_what_has_given_way_for_long_enough_is_recorded(
    database: Database, deployment: Deployment, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clerks, "_GIVE_WAY_SECONDS", 0.1)
    crowd = Crowd(door, monkeypatch)
    clerk = Clerk(database, door, Taking(database, Rules()), lambda: None, 0.05)
    many = AT_ONCE + 1
    event = deployment.generation()
    offers = [Offer("default", parts.comment(event, str(n)).SerializeToString()) for n in range(many)]
    await door.admit_all(offers)
    clerk.wake()
    working = asyncio.create_task(clerk.run())
    await asyncio.wait_for(crowd.asked.wait(), 10)
    await eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
    assert len(recorded(database)) == many
    working.cancel()
    await asyncio.wait([working])


async def test_a_process_that_cannot_start_says_so(tmp_path: Path) -> None:
    process = TakingProcess(Order(f"sqlite:///{tmp_path}/no/\0.db", Rules(), "info"))
    with pytest.raises(errors.Unavailable, match="gave no answer"):
        await asyncio.to_thread(process.take, 1)
    process.close()


async def test_waiting_for_what_is_never_recorded_has_a_deadline(database: Database, door: Door) -> None:
    clerk = Clerk(database, door, Taking(database, Rules()), lambda: None, 0.05)
    with pytest.raises(errors.DeadlineExceeded, match="inbox_depth"):
        await clerk.settled(lambda _: True, 0.05)
