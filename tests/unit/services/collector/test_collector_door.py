"""The door: what it acknowledges is durable, shares commits, and is refused or repeated as each piece deserves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest
import sqlalchemy
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from services.collector import acknowledge as acknowledging
from services.collector import admitting, inbox
from services.collector import door as doors
from services.collector.acknowledge import Acknowledged, Incoming
from services.collector.admitting import Admitting, Offer
from services.collector.config import CollectorSettings
from services.collector.database import Database, migrate
from services.collector.door import Door
from services.collector.rules import Rules
from services.collector.sqlite import inbox_path
from services.collector.submission import Checker
from services.collector.taking import Taking
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import A, B, Deployment
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import Feedback

Admit = Callable[[Feedback], "asyncio.Task[Acknowledged]"]


@pytest.fixture
def hand(database: Database, deployment: Deployment) -> Admitting:
    return Admitting(database, Checker(deployment.key, 1_000))


@pytest.fixture
async def door(hand: Admitting) -> AsyncIterator[Door]:
    door = Door(hand, max_pending=8)
    yield door
    await door.close()


@pytest.fixture
def admit(door: Door) -> Admit:
    return lambda feedback: asyncio.create_task(door.admit(offer(feedback)))


def offer(feedback: Feedback) -> Offer:
    return Offer("default", feedback.SerializeToString())


class Held:
    """Commits that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.release = threading.Event(), threading.Event()
        self.groups: list[int] = []
        acknowledge = acknowledging.acknowledge

        def held(connection: Connection, incoming: Sequence[Incoming]) -> list[acknowledging.Result]:
            self.groups.append(len(incoming))
            self.begun.set()
            assert self.release.wait(10)
            return acknowledge(connection, incoming)

        monkeypatch.setattr(admitting, "acknowledge", held)

    async def first(self) -> None:
        """Returns when the first commit waits."""
        assert await asyncio.to_thread(self.begun.wait, 10)


def in_file(settings: CollectorSettings) -> list[str]:
    """The keys in the inbox, as another process sees them."""
    with contextlib.closing(sqlite3.connect(inbox_path(settings.home / "collector.db"))) as connection:
        return [key for (key,) in connection.execute("select idempotency_key from inbox order by seq")]


async def test_what_is_acknowledged_is_in_the_file(
    admit: Admit, deployment: Deployment, settings: CollectorSettings
) -> None:
    acknowledged = await admit(parts.thumb(deployment.generation(), key="k"))
    assert acknowledged.changed
    assert in_file(settings) == ["k"]


async def test_what_comes_during_a_commit_shares_the_next(
    admit: Admit, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    event = deployment.generation()
    first = admit(parts.comment(event, "0", key="0"))
    await held.first()
    others = [admit(parts.comment(event, str(i), key=str(i))) for i in range(1, 4)]
    await asyncio.sleep(0)
    held.release.set()
    ids = [one.feedback_id for one in await asyncio.gather(first, *others)]
    assert held.groups == [1, 3]
    assert in_file(settings) == ["0", "1", "2", "3"]
    assert ids == sorted(ids)


@pytest.mark.parametrize(("seconds", "coming", "groups"), [(60.0, 3, [1, 4, 3]), (1.0, 2, [1, 4, 2])])
async def test_most_of_those_that_were_in_flight_are_waited_for(
    admit: Admit,
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    coming: int,
    groups: list[int],
) -> None:
    held, event = Held(monkeypatch), deployment.generation()
    monkeypatch.setattr(doors, "GATHER_SECONDS", seconds)

    def come(count: int) -> list[asyncio.Task[Acknowledged]]:
        numbers = [next(number) for _ in range(count)]
        return [admit(parts.comment(event, str(each), key=str(each))) for each in numbers]

    number = itertools.count()
    first = come(1)
    await held.first()
    during = come(4)
    await asyncio.sleep(0)
    held.release.set()
    await asyncio.gather(*first, *during)
    assert held.groups == [1, 4], "who comes alone does not wait"
    after = come(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert held.groups == [1, 4], "of four, three are expected again"
    await asyncio.gather(*after, *come(coming - 1))
    assert held.groups == groups


async def test_what_is_refused_holds_up_nobody(
    admit: Admit, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    pair = deployment.pair()
    first = admit(parts.comparison(*pair, A, key="k"))
    await held.first()
    misguided = parts.comparison(*pair)
    misguided.guidelines_version = "never-shown"
    again, conflict, refused = (
        admit(parts.comparison(*pair, A, key="k")),
        admit(parts.comparison(*pair, B, key="k")),
        admit(misguided),
    )
    await asyncio.sleep(0)
    held.release.set()
    assert await again == (await first)._replace(changed=False)
    with pytest.raises(errors.Conflict, match="'k' was used before"):
        await conflict
    with pytest.raises(errors.InvalidArgument, match="never-shown"):
        await refused
    assert in_file(settings) == ["k"]


async def test_a_key_counts_once_within_a_group_and_once_it_is_recorded(
    admit: Admit, database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    pair = deployment.pair()
    vote, other = parts.comparison(*pair, A, key="k"), parts.comparison(*pair, B, key="k")
    first, again, conflict = await asyncio.gather(admit(vote), admit(vote), admit(other), return_exceptions=True)
    assert isinstance(first, Acknowledged)
    assert again == first._replace(changed=False)
    assert isinstance(conflict, errors.Conflict)
    Taking(database, Rules()).drain()
    assert in_file(settings) == []
    assert await admit(vote) == again
    with pytest.raises(errors.Conflict):
        await admit(other)


async def test_too_many_are_refused_until_some_are_durable(
    admit: Admit, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    event = deployment.generation()
    first = admit(parts.comment(event, "first"))
    await held.first()
    waiting = [admit(parts.comment(event, str(i))) for i in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(errors.ResourceExhausted) as raised:
        await admit(parts.comment(event, "refused"))
    assert raised.value.retry_after > 0
    held.release.set()
    assert len(await asyncio.gather(first, *waiting)) == 9
    assert (await admit(parts.comment(event, "refused"))).changed


async def test_a_submission_has_a_deadline(
    hand: Admitting, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, door = Held(monkeypatch), Door(hand, timeout=0.05)
    event = deployment.generation()
    first = asyncio.create_task(door.admit(offer(parts.comment(event, "1", key="1"))))
    await held.first()
    with pytest.raises(errors.DeadlineExceeded):
        await door.admit(offer(parts.comment(event, "2", key="2")))
    with pytest.raises(errors.DeadlineExceeded):
        await first
    held.release.set()
    await door.close()
    assert in_file(settings) == ["1"], "what was given up before its turn is not taken in"


async def test_each_of_many_comes_to_its_own(
    door: Door, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, event = Held(monkeypatch), deployment.generation()

    def comment(text: str, key: str) -> Offer:
        return offer(parts.comment(event, text, key=key))

    many = [comment(str(i), str(i)) for i in range(6)]
    mine = asyncio.create_task(door.admit_all([*many, comment("0", "0"), comment("other", "0"), *many]))
    await held.first()
    held.release.set()
    results = await mine
    ids = [one.feedback_id for one in results[:6] if isinstance(one, Acknowledged)]
    assert len(ids) == 6
    assert ids == sorted(ids)
    assert isinstance(results[0], Acknowledged)
    assert results[6] == results[0]._replace(changed=False), "the same again"
    assert isinstance(results[7], errors.Conflict), "its key was used with other content"
    assert [type(one) for one in results[8:]] == [errors.ResourceExhausted] * 6, "no more than eight may wait"
    assert in_file(settings) == [str(i) for i in range(6)]
    assert held.groups == [8]


async def test_many_share_a_deadline(hand: Admitting, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    held, door = Held(monkeypatch), Door(hand, timeout=0.05)
    event = deployment.generation()
    offers = [offer(parts.comment(event, str(i), key=str(i))) for i in range(3)]
    results = await door.admit_all(offers)
    assert [type(one) for one in results] == [errors.DeadlineExceeded] * 3
    held.release.set()
    await door.close()
    refused = await door.admit_all(offers[:1])
    assert [type(one) for one in refused] == [errors.Unavailable]


async def test_a_fault_of_ours_is_said_to_be_one(
    door: Door, deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(connection: Connection, incoming: Sequence[Incoming]) -> list[acknowledging.Result]:
        raise ZeroDivisionError

    monkeypatch.setattr(admitting, "acknowledge", broken)
    [refused] = await door.admit_all([offer(parts.comment(deployment.generation(), "x"))])
    assert isinstance(refused, errors.Internal)
    assert str(refused) == "The feedback met a fault of ours: ZeroDivisionError. The collector's log says more."
    assert "ZeroDivisionError" in caplog.text


async def test_a_hand_that_fails_fails_all_of_a_call(deployment: Deployment) -> None:
    class Broken:
        def admit(self, offers: Sequence[Offer], recorded: Sequence[str]) -> admitting.Admitted:
            raise ZeroDivisionError

        def close(self) -> None: ...

    door = Door(Broken())
    with pytest.raises(ZeroDivisionError):
        await door.admit_all([offer(parts.comment(deployment.generation(), "x"))])
    with pytest.raises(ZeroDivisionError):
        await door.drop(["x"])
    await door.close()


async def test_a_key_taken_meanwhile_is_seen_the_second_time(
    admit: Admit, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, runs = inbox.put, []

    def late(connection: Connection, rows: Sequence[inbox.Waiting]) -> None:
        runs.append(len(rows))
        if len(runs) == 1:
            raise IntegrityError("insert", None, sqlite3.IntegrityError("UNIQUE constraint failed"))
        put(connection, rows)

    monkeypatch.setattr(inbox, "put", late)
    assert (await admit(parts.comment(deployment.generation(), "x"))).changed
    assert len(runs) == 2


async def test_what_fails_fails_alone(
    admit: Admit, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = inbox.put

    def picky(connection: Connection, rows: Sequence[inbox.Waiting]) -> None:
        if any(row.idempotency_key == "bad" for row in rows):
            raise ZeroDivisionError
        put(connection, rows)

    monkeypatch.setattr(inbox, "put", picky)
    event = deployment.generation()
    pieces = [admit(parts.comment(event, key, key=key)) for key in ("a", "bad", "b")]
    outcomes = await asyncio.gather(*pieces, return_exceptions=True)
    assert [type(one) for one in outcomes] == [Acknowledged, errors.Internal, Acknowledged]
    assert in_file(settings) == ["a", "b"]


async def test_acknowledging_waits_for_nobody_who_writes_the_record(
    admit: Admit, database: Database, deployment: Deployment
) -> None:
    begun, release = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        assert release.wait(10)

    writing = asyncio.create_task(database.write(hold))
    assert await asyncio.to_thread(begun.wait, 10)
    async with asyncio.timeout(4):  # less than SQLite waits for a lock
        assert (await admit(parts.comment(deployment.generation(), "x"))).changed
    release.set()
    await writing


async def test_closing_makes_durable_what_waits(
    hand: Admitting, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, door = Held(monkeypatch), Door(hand)
    event = deployment.generation()
    offers = [offer(parts.comment(event, "x", key=str(i))) for i in range(300)]
    tasks = [asyncio.create_task(door.admit(one)) for one in offers]
    await held.first()
    held.release.set()
    await door.close()
    await asyncio.gather(*tasks)
    assert len(in_file(settings)) == 300
    with pytest.raises(errors.Unavailable):
        await door.admit(offers[0])


@pytest.fixture
def old(settings: CollectorSettings) -> Iterator[Connection]:
    engine = sqlalchemy.create_engine(settings.database_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


async def test_the_schema_goes_back_only_when_nothing_waits(
    database: Database, admit: Admit, door: Door, deployment: Deployment, old: Connection
) -> None:
    await admit(parts.comment(deployment.generation(), "x"))
    await door.close()
    with pytest.raises(errors.FailedPrecondition, match=r"1 pieces of feedback are acknowledged.*inbox_depth"):
        migrate(old, down_to="0003")
    Taking(database, Rules()).drain()
    database.close()
    migrate(old, down_to="0003")
    migrate(old)
    assert old.exec_driver_sql("SELECT count(*) FROM feedback").scalar_one() == 1


async def test_a_moment_is_quiet_when_nobody_waits_and_nobody_came(
    door: Door, admit: Admit, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert door.quiet_in() == 0.0
    held = Held(monkeypatch)
    coming = admit(parts.comment(deployment.generation(), "x"))
    await held.first()
    monkeypatch.setattr(door, "_came_at", float("-inf"))
    assert door.quiet_in() == doors.QUIET_SECONDS, "one waits for its commit"
    held.release.set()
    await coming
    assert door.quiet_in() == 0.0
    monkeypatch.setattr(doors, "QUIET_SECONDS", 60.0)
    await admit(parts.comment(deployment.generation(), "y"))
    assert 0.0 < door.quiet_in() <= 60.0
