"""The service over gRPC: statuses that name the field and the remedy, and OK only for what is durable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import sqlalchemy
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY
from sqlalchemy import Connection

from services.collector import metrics, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.service import refusal
from services.collector.sqlite import WRITES_INBOX
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment, eventually, store
from tests.unit.services.collector.served import OTHER_TENANT, Client, counter, refused, working
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import ComparisonEvent
from thumbwheel.v1.preference_pb2 import (
    Comparison,
    Feedback,
    FeedbackState,
    GetFeedbackRequest,
    GetGuidelinesRequest,
    ListFeedbackRequest,
    NextComparisonRequest,
    PickStrategy,
    RetractRequest,
    StreamFeedbackRequest,
    SubmitFeedbackBatchRequest,
    SubmitFeedbackRequest,
    ThumbValue,
)


async def test_feedback_is_taken_found_and_taken_back(
    client: Client, database: Database, deployment: Deployment
) -> None:
    feedback = parts.comparison(*deployment.pair(), A)
    submitted = await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    assert submitted.feedback_id
    assert not submitted.duplicate
    assert submitted.received_at.seconds > 0
    again = await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    assert (again.feedback_id, again.duplicate) == (submitted.feedback_id, True)
    assert again.received_at == submitted.received_at
    await client.recorded()
    found = await client.stub.GetFeedback(GetFeedbackRequest(feedback_ids=["no", submitted.feedback_id]))
    [record] = found.records
    assert (record.feedback, record.state) == (feedback, FeedbackState.FEEDBACK_STATE_HELD)
    request = RetractRequest(feedback_id=submitted.feedback_id, user_id="ann")
    for _ in range(2):
        retracted = await client.stub.Retract(request)
        assert retracted.record.state == FeedbackState.FEEDBACK_STATE_RETRACTED
    assert (await database.read(outbox.levels)).unpublished == 2

    async def woken() -> int:
        return client.woken

    await eventually(woken, lambda times: times == 2)


async def test_a_conflict_names_the_key(client: Client, deployment: Deployment) -> None:
    pair = deployment.pair()
    await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(*pair, A, key="the-key")))
    refusals = counter("thumbwheel_collector_refused_total", reason="Conflict")
    async with refused(grpc.StatusCode.ALREADY_EXISTS) as caught:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(*pair, B, key="the-key")))
    assert isinstance(caught[0], errors.Conflict)
    assert "feedback.idempotency_key: 'the-key'" in caught[0].message
    assert counter("thumbwheel_collector_refused_total", reason="Conflict") == refusals + 1


async def test_a_bad_request_names_its_field(client: Client, deployment: Deployment) -> None:
    a, _ = deployment.pair()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.comparison(a, a)))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(raised.value)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [violation.field for violation in bad.field_violations] == ["feedback.comparison.b"]


async def test_a_forged_receipt_is_denied(
    client: Client, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> None:
    forger = Deployment.at(tmp_path_factory.mktemp("forger"))
    async with refused(grpc.StatusCode.PERMISSION_DENIED) as caught:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=parts.thumb(forger.generation())))
    assert "feedback.thumb.receipt" in str(caught[0])
    assert (await database.read(outbox.levels)).unpublished == 0


async def test_a_tenant_sees_only_its_own(client: Client, deployment: Deployment) -> None:
    feedback = parts.thumb(deployment.generation())
    async with refused(grpc.StatusCode.PERMISSION_DENIED):
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback), metadata=OTHER_TENANT)
    id = (await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))).feedback_id
    found = await client.stub.GetFeedback(GetFeedbackRequest(feedback_ids=[id]), metadata=OTHER_TENANT)
    assert len(found.records) == 0
    async with refused(grpc.StatusCode.NOT_FOUND):
        await client.stub.Retract(RetractRequest(feedback_id=id, user_id="ann"), metadata=OTHER_TENANT)


async def test_retract_and_get_check_what_they_are_given(client: Client) -> None:
    for request, field in (
        (RetractRequest(user_id="ann"), "feedback_id"),
        (RetractRequest(feedback_id="x"), "user_id"),
    ):
        async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
            await client.stub.Retract(request)
        assert isinstance(caught[0], errors.InvalidArgument)
        assert caught[0].field == field
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.GetFeedback(GetFeedbackRequest(feedback_ids=[str(i) for i in range(1_001)]))
    assert str(caught[0]).startswith("feedback_ids: holds 1001 ids")


async def test_a_full_disk_says_what_to_do_and_passes(
    hands_off: Client, database: Database, deployment: Deployment
) -> None:
    pages = 1  # SQLite takes that for as many as there are

    def limit(connection: Connection) -> None:
        if connection.get_execution_options().get("mode") == WRITES_INBOX:
            connection.exec_driver_sql(f"PRAGMA door.max_page_count={pages}").close()

    sqlalchemy.event.listen(database._engine, "begin", limit)
    event = deployment.generation()
    acked: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:  # noqa: PT012 - how many fit into the last pages is not known
        while len(acked) < 200:
            request = SubmitFeedbackRequest(feedback=parts.comment(event, "x" * 900))
            acked.append((await hands_off.stub.SubmitFeedback(request)).feedback_id)
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    failure = errors.from_rpc_error(raised.value)
    assert isinstance(failure, errors.NoSpace)
    assert "Free space" in failure.remedy
    found = await hands_off.stub.GetFeedback(GetFeedbackRequest(feedback_ids=acked))
    assert len(found.records) == len(acked)
    pages = 1_000_000
    again = await hands_off.stub.SubmitFeedback(request)
    assert not again.duplicate
    async with working(hands_off):
        await hands_off.recorded()
    assert (await database.read(outbox.levels)).unpublished == len(acked) + 1


async def test_a_batch_says_what_became_of_each(client: Client, deployment: Deployment) -> None:
    pair = deployment.pair()
    good, again, forged = parts.comparison(*pair), parts.comparison(*pair, key="k"), parts.comparison(*pair)
    forged.comparison.b.signature = b"x" * 64
    conflict = parts.comparison(*pair, B, key="k")
    request = SubmitFeedbackBatchRequest(
        feedback=[good, again, again, forged, conflict, parts.comparison(pair[0], pair[0])]
    )
    results = (await client.stub.SubmitFeedbackBatch(request)).results
    assert [result.WhichOneof("outcome") for result in results] == ["recorded"] * 3 + ["refused"] * 3
    assert [result.recorded.duplicate for result in results[:3]] == [False, False, True]
    assert results[1].recorded.feedback_id == results[2].recorded.feedback_id
    assert [result.refused.code for result in results[3:]] == [7, 6, 3]
    assert results[5].refused.field == "feedback.comparison.b"
    assert not any(result.refused.HasField("retry_after") for result in results)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.SubmitFeedbackBatch(SubmitFeedbackBatchRequest(feedback=[good] * 1_001))
    assert str(caught[0]).startswith("feedback: holds 1001")


async def test_a_stream_is_answered_when_all_of_it_is_durable(client: Client, deployment: Deployment) -> None:
    event = deployment.generation()
    sent = [parts.comment(event, f"comment {i}", key=str(i)) for i in range(300)]
    sent[7].ClearField("user_id")

    async def requests() -> AsyncIterator[StreamFeedbackRequest]:
        for feedback in sent:
            yield StreamFeedbackRequest(feedback=feedback)

    results = (await client.stub.StreamFeedback(requests())).results
    assert len(results) == 300
    assert results[7].refused.field == "feedback.user_id"
    ids = [result.recorded.feedback_id for i, result in enumerate(results) if i != 7]
    assert ids == sorted(ids), "in the order in which they were sent"
    found = (await client.stub.GetFeedback(GetFeedbackRequest(feedback_ids=ids))).records
    assert [record.feedback.idempotency_key for record in found] == [str(i) for i in range(300) if i != 7]


async def test_what_can_be_told_to_wait_says_for_how_long() -> None:
    told = refusal(errors.ResourceExhausted("too much", retry_after=2.5))
    assert (told.code, told.retry_after) == (8, 2.5)
    assert refusal(errors.Unavailable("away")).retry_after == 1.0


async def test_feedback_is_listed_by_where_it_stands(
    client: Client, database: Database, deployment: Deployment
) -> None:
    pairs = [deployment.pair() for _ in range(5)]
    await store(database, *(event for pair in pairs for event in pair))
    ids = []
    for index, pair in enumerate(pairs):
        feedback = parts.comparison(*pair, TIE if index % 2 else A, user="bob" if index == 4 else "ann")
        ids.append((await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))).feedback_id)
    await client.recorded()

    async def listed(**fields: Any) -> list[str]:
        return [r.feedback_id for r in (await client.stub.ListFeedback(ListFeedbackRequest(**fields))).records]

    assert await listed() == ids[::-1]
    assert await listed(states=[FeedbackState.FEEDBACK_STATE_APART]) == [ids[3], ids[1]]
    assert await listed(reason="tie") == [ids[3], ids[1]]
    assert await listed(reason="preferred", user_id="bob") == [ids[4]]
    assert await listed(prompt_id=pairs[2][0].generation.prompt_id) == [ids[2]]
    first = await client.stub.ListFeedback(ListFeedbackRequest(page_size=3))
    rest = await client.stub.ListFeedback(ListFeedbackRequest(page_size=3, page_token=first.next_page_token))
    assert [r.feedback_id for r in (*first.records, *rest.records)] == ids[::-1]
    assert rest.next_page_token == ""
    assert [r.weight for r in first.records] == [1.0, 0.0, 1.0]
    other = await client.stub.ListFeedback(ListFeedbackRequest(), metadata=OTHER_TENANT)
    assert len(other.records) == 0
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.ListFeedback(ListFeedbackRequest(page_size=1_001))
    assert "page_size" in str(caught[0])


async def test_guidelines_are_versions_that_votes_refer_to(client: Client, deployment: Deployment) -> None:
    first = await client.stub.GetGuidelines(GetGuidelinesRequest())
    assert (first.number, first.version.partition("-")[0]) == (1, "1")
    assert [aspect.aspect for aspect in first.aspects] == ["helpfulness", "harmlessness", "fluency"]
    assert all(len(aspect.text) > 300 for aspect in first.aspects)
    assert await client.stub.GetGuidelines(GetGuidelinesRequest(version=first.version)) == first
    assert await client.stub.GetGuidelines(GetGuidelinesRequest()) == first
    feedback = parts.comparison(*deployment.pair())
    feedback.guidelines_version = first.version
    id = (await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))).feedback_id
    [record] = (await client.stub.GetFeedback(GetFeedbackRequest(feedback_ids=[id]))).records
    assert record.feedback.guidelines_version == first.version
    feedback = parts.comparison(*deployment.pair())
    feedback.guidelines_version = "2-0123456789abcdef"
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=feedback))
    assert "feedback.guidelines_version: is '2-0123456789abcdef'" in str(caught[0])
    async with refused(grpc.StatusCode.NOT_FOUND):
        await client.stub.GetGuidelines(GetGuidelinesRequest(version="9-no"))


async def test_the_next_comparison_is_shown_once_and_its_propensity_kept(
    client: Client, database: Database, deployment: Deployment
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    picked = await client.stub.NextComparison(NextComparisonRequest(user_id="ann"))
    assert {picked.a.generation_id, picked.b.generation_id} == {a.event_id, b.event_id}
    assert (picked.prompt, picked.propensity) == (a.prompt, 0.5)
    assert picked.strategy == PickStrategy.PICK_STRATEGY_RANDOM
    async with refused(grpc.StatusCode.NOT_FOUND):
        await client.stub.NextComparison(NextComparisonRequest(user_id="ann"))
    vote = Comparison(a=picked.a.receipt, b=picked.b.receipt, preference=A, propensity=0.25)
    wrong = Feedback(idempotency_key="w", user_id="ann", comparison=vote)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT) as caught:
        await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=wrong))
    assert "feedback.comparison.propensity: is 0.25, but NextComparison returned 0.5" in str(caught[0])
    right = Feedback.FromString(wrong.SerializeToString())
    right.comparison.ClearField("propensity")
    await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=right))
    await client.recorded()
    rows = await database.read(lambda connection: outbox.waiting(connection, 10))
    [event] = [ComparisonEvent.FromString(row.value) for row in rows if row.topic == topics.COMPARISONS]
    assert event.propensity == 0.5
    await client.stub.NextComparison(NextComparisonRequest(user_id="bob"))
    async with refused(grpc.StatusCode.NOT_FOUND):
        await client.stub.NextComparison(NextComparisonRequest(user_id="bob"), metadata=OTHER_TENANT)


async def test_the_client_library_does_all_of_it(client: Client, database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    async with AsyncClient(collector=client.address) as app:
        guidelines = await app.guidelines()
        assert await app.guidelines(guidelines.version) == guidelines
        picked = await app.next_comparison("ann")
        vote = parts.comparison(a, b, user="bob")
        vote.ClearField("idempotency_key")
        [result] = await app.submit_batch([vote])
        assert result.recorded.feedback_id
        await app.implicit(picked.a, "dwelled", user_id="ann", seconds=2.5)
        await app.implicit(picked.a, "copied", user_id="ann")
        await client.recorded()
        page = await app.list_feedback(ListFeedbackRequest(reason="weak_evidence"))
        assert [record.feedback.implicit.seconds for record in page.records] == [0.0, 2.5]
        assert {record.state for record in page.records} == {FeedbackState.FEEDBACK_STATE_RECORDED}
        with pytest.raises(errors.NotFound):
            await app.next_comparison("ann")


async def test_metrics_count_what_happened(client: Client, database: Database, deployment: Deployment) -> None:
    recorded = counter("thumbwheel_collector_feedback_total", kind="comparison", state="HELD")
    duplicates = counter("thumbwheel_collector_duplicates_total")
    commits = counter("thumbwheel_collector_commit_seconds_count")
    preferred = counter("thumbwheel_collector_verdicts_total", kind="comparison", verdict="a")
    disliked = counter("thumbwheel_collector_verdicts_total", kind="thumb", verdict="down")
    thumb = parts.thumb(deployment.pair()[0])
    thumb.thumb.value = ThumbValue.THUMB_VALUE_DOWN
    await client.stub.SubmitFeedback(SubmitFeedbackRequest(feedback=thumb))
    request = SubmitFeedbackRequest(feedback=parts.comparison(*deployment.pair()))
    for _ in range(3):
        await client.stub.SubmitFeedback(request)
    await client.recorded()

    async def held() -> float:
        return counter("thumbwheel_collector_feedback_total", kind="comparison", state="HELD")

    await eventually(held, lambda count: count == recorded + 1)
    assert counter("thumbwheel_collector_duplicates_total") == duplicates + 2
    assert counter("thumbwheel_collector_verdicts_total", kind="comparison", verdict="a") == preferred + 1
    assert counter("thumbwheel_collector_verdicts_total", kind="thumb", verdict="down") == disliked + 1
    assert counter("thumbwheel_collector_commit_seconds_count") == commits + 4
    with metrics.LevelCollector(lambda: database.read_now(outbox.levels)):
        assert counter("thumbwheel_collector_database_up") == 1
        assert counter("thumbwheel_collector_outbox_depth") == 2
        assert counter("thumbwheel_collector_held") == 2
        assert counter("thumbwheel_collector_inbox_depth") == 0
        assert 0 <= counter("thumbwheel_collector_outbox_oldest_seconds") < 60
    assert REGISTRY.get_sample_value("thumbwheel_collector_held") is None


def test_a_database_that_is_away_is_a_metric_and_hides_no_other() -> None:
    def away() -> metrics.Levels:
        raise errors.Unavailable("It is away.")

    with metrics.LevelCollector(away):
        assert REGISTRY.get_sample_value("thumbwheel_collector_database_up") == 0
        assert REGISTRY.get_sample_value("thumbwheel_collector_held") is None
        assert REGISTRY.get_sample_value("process_start_time_seconds") is not None


def test_the_default_settings(tmp_path: Path) -> None:
    settings = CollectorSettings(home=tmp_path)
    assert (settings.listen, settings.metrics_port) == ("127.0.0.1:50053", 9103)
    assert settings.database_url == f"sqlite:///{tmp_path}/collector.db"
    assert CollectorSettings(database="postgresql://host/name").database_url == "postgresql://host/name"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from services.collector.__main__ import main\n"
        "sys.argv = ['collector', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'sqlalchemy', 'alembic', 'grpc', 'kafka'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--max-text-bytes" in ended.stdout
    assert "Longest edit or comment" in ended.stdout
