"""The first stage in its own process: what it says, and what becomes of what it was asked when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial

import psutil
import pytest

from services.collector import admitting, child, inbox
from services.collector.acknowledge import Acknowledged
from services.collector.admitting import Admitting, Offer
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.door import AdmittingProcess, Door
from services.collector.submission import Checker, Submission
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import Feedback


def order(settings: CollectorSettings) -> admitting.Order:
    return admitting.Order(settings.database_url, settings.keys_path, 1_000, None, "info")


@pytest.fixture
def hand(settings: CollectorSettings, database: Database, deployment: Deployment) -> Iterator[AdmittingProcess]:
    """The real process."""
    process = AdmittingProcess(order(settings))
    yield process
    process.close()


def offer(feedback: Feedback, *, tenant: str = "default") -> Offer:
    return Offer(tenant, feedback.SerializeToString(), "00-trace-span-01")


def waiting(database: Database) -> list[inbox.Waiting]:
    return database.read_now(partial(inbox.oldest, limit=100))


def test_what_is_refused_is_refused_in_its_place(database: Database, deployment: Deployment) -> None:
    event = deployment.generation()
    here = Admitting(database, Checker(deployment.key, 1_000))
    nobody = parts.comment(event, "nobody's", key="2")
    nobody.user_id = ""
    offers = [
        offer(parts.comment(event, "one", key="1")),
        offer(nobody),
        offer(parts.comment(event, "three", key="3"), tenant="other"),
        offer(parts.comment(event, "four", key="1")),
        offer(parts.comment(event, "five", key="5")),
    ]
    first, misses, foreign, conflict, last = here.admit(offers, []).results
    here.close()
    assert isinstance(misses, errors.InvalidArgument)
    assert misses.field == "feedback.user_id"
    assert isinstance(foreign, errors.PermissionDenied)
    assert isinstance(conflict, errors.Conflict)
    assert isinstance(first, Acknowledged)
    assert isinstance(last, Acknowledged)
    assert [(row.feedback_id, row.idempotency_key, row.traceparent) for row in waiting(database)] == [
        (first.feedback_id, "1", "00-trace-span-01"),
        (last.feedback_id, "5", "00-trace-span-01"),
    ]


def test_a_fault_in_checking_is_one_callers_alone(
    database: Database, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Checker.check

    def broken(self: Checker, feedback: Feedback, *, tenant: str) -> Submission:
        if feedback.idempotency_key == "bad":
            raise ZeroDivisionError
        return check(self, feedback, tenant=tenant)

    monkeypatch.setattr(Checker, "check", broken)
    here, event = Admitting(database, Checker(deployment.key, 1_000)), deployment.generation()
    found = here.admit([offer(parts.comment(event, key, key=key)) for key in ("a", "bad", "b")], [])
    here.close()
    assert [type(one) for one in found.results] == [Acknowledged, errors.Internal, Acknowledged]
    assert [row.idempotency_key for row in waiting(database)] == ["a", "b"]


def test_another_process_says_the_same(database: Database, deployment: Deployment, hand: AdmittingProcess) -> None:
    pair = deployment.pair()
    vote, other = parts.comparison(*pair, parts.A, key="k"), parts.comparison(*pair, parts.B, key="k")
    foreign = offer(vote, tenant="other")
    [made, again, conflict, refused] = hand.admit([offer(vote), offer(vote), offer(other), foreign], []).results
    assert isinstance(made, Acknowledged)
    assert again == made._replace(changed=False)
    assert isinstance(conflict, errors.Conflict)
    assert str(conflict).startswith("feedback.idempotency_key: 'k' was used before")
    assert isinstance(refused, errors.PermissionDenied)
    assert refused.remedy == "Send it as the tenant that asked for the response."
    assert [row.feedback_id for row in waiting(database)] == [made.feedback_id]
    assert hand.admit([], [made.feedback_id]) == admitting.Admitted([])
    assert waiting(database) == []


async def test_it_is_started_again_when_it_dies_and_what_was_acknowledged_is_there(
    database: Database, deployment: Deployment, hand: AdmittingProcess
) -> None:
    door = Door(hand)
    event = deployment.generation()
    acknowledged: list[str] = []
    told: list[str] = []

    async def say(number: int) -> None:
        piece = offer(parts.comment(event, str(number), key=str(number)))
        while True:
            try:
                acknowledged.append((await door.admit(piece)).feedback_id)
            except errors.Unavailable as error:
                told.append(str(error))
            else:
                return

    await say(0)
    for round_ in range(3):
        others = [asyncio.create_task(say(number)) for number in range(1 + 20 * round_, 21 + 20 * round_)]
        await asyncio.sleep(0)
        assert hand.pid is not None
        os.kill(hand.pid, signal.SIGKILL)
        await asyncio.gather(*others)
    await door.close()
    assert hand.pid is None, "it ends with the door"
    assert told
    assert all(one.startswith("The process of services.collector.admitting gave no answer") for one in told)
    rows = waiting(database)
    assert sorted(row.feedback_id for row in rows) == sorted(acknowledged)
    assert {row.idempotency_key for row in rows} == {str(number) for number in range(61)}


def test_one_that_does_not_answer_is_not_waited_for(
    hand: AdmittingProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert hand.admit([], []) == admitting.Admitted([])
    assert hand.pid is not None
    process = psutil.Process(hand.pid)
    process.suspend()
    monkeypatch.setattr(child, "ANSWER_SECONDS", 0.2)
    with pytest.raises(errors.Unavailable, match=r"gave no answer: none within 0\.2 s"):
        hand.admit([], [])
    assert not process.is_running()
    assert "a stage gave no answer" in caplog.text
    monkeypatch.undo()
    assert hand.admit([], []) == admitting.Admitted([]), "and there is another"


def test_one_that_takes_nothing_is_not_waited_for(
    deployment: Deployment, hand: AdmittingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_MESSAGE_SECONDS", 1)
    hand.admit([], [])
    assert hand.pid is not None
    psutil.Process(hand.pid).suspend()
    large = offer(parts.comment(deployment.generation(), "x" * 1_000_000))
    with pytest.raises(errors.Unavailable, match=r"gave no answer: .*temporarily unavailable"):
        hand.admit([large] * 8, [])
    assert hand.pid is None


def test_what_it_cannot_open_it_says(settings: CollectorSettings, database: Database) -> None:
    process = AdmittingProcess(order(settings))
    with pytest.raises(errors.FailedPrecondition, match=r"receipt\.key does not exist"):
        process.admit([], [])
    process.close()
