"""Tenants never see each other's data: every call, with everything that another tenant could know."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest

from services.collector import outbox
from services.collector.admitting import Admitting
from services.collector.asking import Asking
from services.collector.clerk import Clerk
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.door import Door
from services.collector.rights.eraser import Eraser
from services.collector.rights.tenants import Tenants
from services.collector.rules import Rules
from services.collector.service import Preferences
from services.collector.submission import Checker
from services.collector.taking import Taking
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel import serving
from thumbwheel.client import AsyncClient
from thumbwheel.v1 import preference_pb2 as pb
from thumbwheel.v1 import preference_pb2_grpc

MINE = ((serving.TENANT_KEY, "mine"),)
THEIRS = ((serving.TENANT_KEY, "theirs"),)


@pytest.fixture
async def address(database: Database, deployment: Deployment, settings: CollectorSettings) -> AsyncIterator[str]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    door = Door(Admitting(database, Checker(deployment.key, 1_000)))
    clerk = Clerk(database, door, Taking(database, Rules()), lambda: None, 0.05)
    eraser = Eraser(database, settings, Tenants(), lambda: None, clerk=clerk)
    asking = Asking(database, draw=random.Random(0))
    curator = parts.curator_of(database)
    service = Preferences(database, curator, asking, eraser, door, clerk, lambda: None)
    preference_pb2_grpc.add_PreferenceServiceServicer_to_server(service, serving.guarded(server))
    await server.start()
    working = [asyncio.create_task(eraser.run()), asyncio.create_task(clerk.run())]
    yield f"127.0.0.1:{port}"
    for task in working:
        task.cancel()
    await asyncio.wait(working)
    await server.stop(None)
    await door.close()


@pytest.fixture
async def stub(address: str) -> AsyncIterator[preference_pb2_grpc.PreferenceServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield preference_pb2_grpc.PreferenceServiceStub(channel)


@contextlib.contextmanager
def refused(code: grpc.StatusCode) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        yield
    assert raised.value.code() == code, raised.value.details()


async def test_a_client_says_of_everything_whether_its_users_agree(
    address: str, database: Database, deployment: Deployment
) -> None:
    pair = deployment.pair()
    await parts.store(database, *pair)
    async with AsyncClient(collector=address, control=address, consent=False) as client:
        ids = [(await client.compare(pair[0].generation, pair[1].generation, "a", user_id="ann")).feedback_id]
        said = parts.thumb(pair[0], user="bob")
        said.consent = True
        results = await client.submit_batch([parts.thumb(pair[0], user="cyd"), said])
        ids += [result.recorded.feedback_id for result in results]
        await parts.eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
        reasons = [record.reason for record in await client.feedback(ids)]
        assert reasons == ["no_consent", "no_consent", "unpaired_thumb"], "what is said of one counts for that one"
        forgotten = await client.forget("ann")
        assert (forgotten.feedback_erased, forgotten.generations_erased) == (1, 0), "others judged it too"


async def test_no_call_shows_or_touches_another_tenants_data(
    stub: Any, database: Database, deployment: Deployment
) -> None:
    theirs = Deployment(deployment.key, "theirs")
    pair = theirs.pair("secret-a", "secret-b")
    await parts.store(database, *pair)
    vote = parts.comparison(*pair, key="k", user="ann")
    held = await stub.SubmitFeedback(pb.SubmitFeedbackRequest(feedback=vote), metadata=THEIRS)
    called = set()

    def request(name: str, **fields: Any) -> Any:
        called.add(name)
        return getattr(pb, f"{name}Request")(**fields)

    # Their receipts are no use to us, one by one, in a batch or in a stream.
    with refused(grpc.StatusCode.PERMISSION_DENIED):
        await stub.SubmitFeedback(request("SubmitFeedback", feedback=vote), metadata=MINE)
    batch = await stub.SubmitFeedbackBatch(request("SubmitFeedbackBatch", feedback=[vote]), metadata=MINE)
    streamed = await stub.StreamFeedback([request("StreamFeedback", feedback=vote)], metadata=MINE)
    for answer in (batch, streamed):
        assert [one.refused.code for one in answer.results] == [grpc.StatusCode.PERMISSION_DENIED.value[0]]
    # Nor are their ids and names.
    with refused(grpc.StatusCode.NOT_FOUND):
        await stub.Retract(request("Retract", feedback_id=held.feedback_id, user_id="ann"), metadata=MINE)
    found = await stub.GetFeedback(request("GetFeedback", feedback_ids=[held.feedback_id]), metadata=MINE)
    assert list(found.records) == []
    for fields in ({}, {"user_id": "ann"}, {"prompt_id": pair[0].generation.prompt_id}):
        assert list((await stub.ListFeedback(request("ListFeedback", **fields), metadata=MINE)).records) == []
    with refused(grpc.StatusCode.NOT_FOUND):
        await stub.NextComparison(request("NextComparison", user_id="bob"), metadata=MINE)
    guidelines = await stub.GetGuidelines(request("GetGuidelines"), metadata=THEIRS)
    assert (await stub.GetGuidelines(request("GetGuidelines"), metadata=MINE)).number == guidelines.number == 1
    forgotten = await stub.Forget(request("Forget", user_id="ann"), metadata=MINE)
    assert (forgotten.feedback_erased, forgotten.generations_erased) == (0, 0)
    # It is all there still, for them.
    await parts.eventually(partial(database.read, outbox.levels), lambda levels: levels.unrecorded == 0)
    [record] = (
        await stub.GetFeedback(request("GetFeedback", feedback_ids=[held.feedback_id]), metadata=THEIRS)
    ).records
    assert record.state == pb.FEEDBACK_STATE_ACCEPTED
    shown = await stub.NextComparison(request("NextComparison", user_id="bob"), metadata=THEIRS)
    assert {shown.a.text, shown.b.text} == {"secret-a", "secret-b"}
    # The same user's name here is another user, who was forgotten; theirs was not.
    again = parts.thumb(pair[0], user="ann")
    await stub.SubmitFeedback(pb.SubmitFeedbackRequest(feedback=again), metadata=THEIRS)
    assert called == {method.name for method in pb.DESCRIPTOR.services_by_name["PreferenceService"].methods}
