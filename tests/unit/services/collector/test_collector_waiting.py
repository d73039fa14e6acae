"""What is acknowledged and not recorded yet, over gRPC; and forgetting."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from services.collector import outbox, tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import B, Deployment, store
from tests.unit.services.collector.served import OTHER_TENANT, Client, refused, working
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import (
    FeedbackState,
    ForgetRequest,
    GetFeedbackRequest,
    ListFeedbackRequest,
    RetractRequest,
    SubmitFeedbackRequest,
)


async def test_what_waits_is_found_listed_and_counted(
    hands_off: Client, database: Database, deployment: Deployment
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    old = await deployment.submit(database, parts.comment(a, "recorded at once"))
    feedback = parts.comparison(a, b, key="k")
    made = await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    levels = await database.read(outbox.levels)
    assert (levels.unrecorded, levels.unpublished) == (1, 1)
    [record] = (await hands_off.stub.GetFeedback(GetFeedbackRequest(feedback_ids=[made.feedback_id]))).records
    assert (record.feedback, record.received_at, record.reason) == (feedback, made.received_at, "received")
    assert record.state == FeedbackState.FEEDBACK_STATE_HELD

    async def listed(**fields: Any) -> list[str]:
        return [r.feedback_id for r in (await hands_off.stub.ListFeedback(ListFeedbackRequest(**fields))).records]

    both = [made.feedback_id, old.record.feedback_id]
    assert await listed() == both
    assert await listed(page_size=1) == both[:1]
    assert await listed(page_token=both[0]) == both[1:]
    assert await listed(states=[FeedbackState.FEEDBACK_STATE_HELD]) == both[:1]
    assert await listed(reason="received", user_id="ann") == both[:1]
    assert await listed(reason="received", user_id="bob") == []
    assert await listed(states=[FeedbackState.FEEDBACK_STATE_RECORDED]) == both[1:]
    again = await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    assert (again.feedback_id, again.duplicate) == (made.feedback_id, True)
    async with refused(grpc.StatusCode.ALREADY_EXISTS):
        await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(a, b, B, key="k")))
    async with working(hands_off):
        await hands_off.recorded()
        [record] = (await hands_off.stub.GetFeedback(GetFeedbackRequest(feedback_ids=[made.feedback_id]))).records
        assert record.state == FeedbackState.FEEDBACK_STATE_ACCEPTED
        again = await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
        assert (again.feedback_id, again.duplicate) == (made.feedback_id, True)


async def test_what_waits_is_retracted_once_it_is_recorded(hands_off: Client, deployment: Deployment) -> None:
    feedback = parts.comparison(*deployment.pair())
    made = await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    retraction = RetractRequest(feedback_id=made.feedback_id, user_id="ann")
    retracting = asyncio.create_task(_awaited(hands_off.stub.Retract(retraction)))
    async with working(hands_off):
        assert (await retracting).record.state == FeedbackState.FEEDBACK_STATE_RETRACTED


async def _awaited(call: Any) -> Any:
    return await call


async def test_what_waits_is_forgotten(
    hands_off: Client, database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    event = deployment.generation()
    secret = "words-of-ann-4f1c"
    request = SubmitFeedbackRequest(feedback=parts.comment(event, secret))
    await hands_off.stub.SubmitFeedback(request)
    await hands_off.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comment(event, "bob's", user="bob")))
    assert [path for path in settings.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    erasing = asyncio.create_task(hands_off.eraser.run())
    async with working(hands_off):
        response = await hands_off.stub.Forget(ForgetRequest(user_id="ann"))
        assert response.feedback_erased == 1
        async with refused(grpc.StatusCode.FAILED_PRECONDITION):
            await hands_off.stub.SubmitFeedback(request)
        await hands_off.recorded()
    erasing.cancel()
    await asyncio.wait([erasing])
    assert not [path for path in settings.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert [r.user_id for r in await database.read(lambda c: c.execute(tables.feedback.select()).all())] == ["bob"]


async def test_forget_answers_when_it_is_done(client: Client, deployment: Deployment) -> None:
    pair = deployment.pair()
    await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(*pair, key="k")))
    running = asyncio.create_task(client.eraser.run())
    nothing = await client.stub.Forget(ForgetRequest(user_id="ann"), metadata=OTHER_TENANT)
    assert (nothing.feedback_erased, nothing.generations_erased) == (0, 0)
    response = await client.stub.Forget(ForgetRequest(user_id="ann"))
    assert (response.feedback_erased, response.generations_erased) == (1, 0)
    assert response.stream_clean_at.ToMicroseconds() > response.erased_at.ToMicroseconds() > 0
    async with refused(grpc.StatusCode.FAILED_PRECONDITION) as caught:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(*pair, key="k")))
    assert "new pseudonym" in caught[0].remedy
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.Forget(ForgetRequest())
    assert isinstance(caught[0], errors.InvalidArgument)
    assert caught[0].field == "user_id"
    running.cancel()
    await asyncio.wait([running])
