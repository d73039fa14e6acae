"""The record: submitted once, joined when it can be, retracted by its user, published with what it says."""

from __future__ import annotations

from functools import partial

import pytest

from services.collector import ledger, outbox
from services.collector.database import Database
from services.collector.outbox import Row
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment, retract, store
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, FeedbackEvent
from thumbwheel.v1.preference_pb2 import FeedbackRecord, FeedbackState


async def rows(database: Database) -> list[Row]:
    return await database.read(partial(outbox.waiting, limit=1_000))


async def published_comparisons(database: Database) -> list[ComparisonEvent]:
    return [ComparisonEvent.FromString(row.value) for row in await rows(database) if row.topic == topics.COMPARISONS]


async def published_feedback(database: Database) -> list[FeedbackRecord]:
    return [FeedbackEvent.FromString(r.value).record for r in await rows(database) if r.topic == topics.FEEDBACK]


async def find(database: Database, *ids: str, tenant: str = "default") -> list[FeedbackRecord]:
    return await database.read(partial(ledger.find, feedback_ids=ids, tenant=tenant))


async def test_a_comparison_of_known_responses_is_accepted_and_published(
    database: Database, deployment: Deployment
) -> None:
    a, b = deployment.pair()
    assert await store(database, a, b) == []
    recorded = await deployment.submit(database, parts.comparison(a, b, B))
    assert (recorded.kind, recorded.state, recorded.changed) == ("comparison", "ACCEPTED", True)
    [event] = await published_comparisons(database)
    assert event.comparison_id == recorded.record.comparison_id != ""
    assert event.chosen.text == b.generation.text
    assert event.received_at == recorded.record.received_at
    assert list(event.feedback_ids) == [recorded.record.feedback_id]
    assert await published_feedback(database) == [recorded.record]
    assert await find(database, recorded.record.feedback_id) == [recorded.record]
    for row in await rows(database):
        assert row.key.decode() == a.generation.prompt_id
        assert row.headers[0] == ("schema", row.schema.encode())
        assert row.headers[1] == ("event_id", row.event_id.encode())


async def test_every_kind_of_event_says_its_schema_and_trace(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    submission = Checker(deployment.key, 1_000).check(parts.comparison(a, b), tenant="default")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await parts.record(database, submission, traceparent=trace)
    assert [(row.schema, row.headers[2]) for row in await rows(database)] == [
        ("thumbwheel.v1.FeedbackEvent", ("traceparent", trace.encode())),
        ("thumbwheel.v1.ComparisonEvent", ("traceparent", trace.encode())),
    ]


async def test_what_waited_for_its_generations_keeps_the_trace_of_its_own_call(
    database: Database, deployment: Deployment
) -> None:
    held, traces = [], ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "", "00-ab")
    for trace in traces:
        a, b = deployment.pair()
        submission = Checker(deployment.key, 1_000).check(parts.comparison(a, b), tenant="default")
        await parts.record(database, submission, traceparent=trace)
        held += [a, b]
    await store(database, *held)
    comparisons = [row for row in await rows(database) if row.topic == topics.COMPARISONS]
    assert [row.traceparent for row in comparisons] == list(traces)


async def test_the_same_submission_again_changes_nothing(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    feedback = parts.comparison(a, b, key="k")
    first = await deployment.submit(database, feedback)
    before = await rows(database)
    again = await deployment.submit(database, feedback)
    assert (again.record, again.changed) == (first.record, False)
    assert await rows(database) == before


async def test_the_same_key_with_other_content_is_a_conflict(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await deployment.submit(database, parts.comparison(a, b, A, key="the-key"))
    before = await rows(database)
    with pytest.raises(errors.Conflict, match="'the-key' was used before") as raised:
        await deployment.submit(database, parts.comparison(a, b, B, key="the-key"))
    assert "new key" in raised.value.remedy
    assert await rows(database) == before


async def test_two_tenants_may_use_one_key(database: Database, deployment: Deployment) -> None:
    other = Deployment(deployment.key, tenant="other")
    mine = await deployment.submit(database, parts.thumb(deployment.generation(), key="k"))
    theirs = await other.submit(database, parts.thumb(other.generation(), key="k"))
    assert mine.record.feedback_id != theirs.record.feedback_id
    assert await find(database, mine.record.feedback_id, tenant="other") == []
    with pytest.raises(errors.NotFound):
        await retract(database, mine.record.feedback_id, tenant="other")


async def test_feedback_is_held_until_both_generations_are_there(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    held = await deployment.submit(database, parts.comparison(a, b))
    assert (held.state, held.record.reason) == ("HELD", "awaiting_generation")
    assert await store(database, b) == []
    assert await published_comparisons(database) == []
    assert (await database.read(outbox.levels)).held == 1
    [joined] = await store(database, a)
    assert joined.state == "ACCEPTED"
    assert joined.record.feedback_id == held.record.feedback_id
    [event] = await published_comparisons(database)
    assert event.chosen.text == a.generation.text
    assert event.received_at == held.record.received_at
    assert [record.state for record in await published_feedback(database)] == [
        FeedbackState.FEEDBACK_STATE_HELD,
        FeedbackState.FEEDBACK_STATE_ACCEPTED,
    ]
    assert await find(database, held.record.feedback_id) == [joined.record]
    assert (await database.read(outbox.levels)).held == 0


async def test_one_generation_joins_all_that_waited_for_it(database: Database, deployment: Deployment) -> None:
    event = deployment.generation("Pariss.")
    for feedback in (parts.thumb(event), parts.edit(event, "Paris."), parts.comment(event, "Typo.")):
        assert (await deployment.submit(database, feedback)).state == "HELD"
    joined = await store(database, event)
    assert [(one.kind, one.state) for one in joined] == [
        ("thumb", "RECORDED"),
        ("edit", "ACCEPTED"),
        ("comment", "RECORDED"),
    ]
    [comparison] = await published_comparisons(database)
    assert (comparison.chosen.text, comparison.rejected.text) == ("Paris.", "Pariss.")


async def test_a_generation_that_comes_twice_counts_once(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await deployment.submit(database, parts.comparison(a, b))
    assert len(await store(database, a, b, a)) == 1
    assert await store(database, a, b) == []
    assert len(await published_comparisons(database)) == 1


async def test_a_tie_is_recorded_and_never_emitted(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    recorded = await deployment.submit(database, parts.comparison(a, b, TIE))
    assert (recorded.state, recorded.record.reason) == ("APART", "tie")
    assert await published_comparisons(database) == []
    assert await published_feedback(database) == [recorded.record]


async def test_a_retraction_takes_back_the_comparison_once(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    recorded = await deployment.submit(database, parts.comparison(a, b))
    id = recorded.record.feedback_id
    first = await retract(database, id)
    assert (first.state, first.changed) == ("RETRACTED", True)
    again = await retract(database, id)
    assert (again.record, again.changed) == (first.record, False)
    accepted, retracted = await published_comparisons(database)
    assert retracted.state == ComparisonState.COMPARISON_STATE_RETRACTED
    assert retracted.comparison_id == accepted.comparison_id
    assert retracted.event_id != accepted.event_id
    assert (retracted.tenant, retracted.prompt_id) == ("default", a.generation.prompt_id)
    assert list(retracted.feedback_ids) == [id]
    assert not retracted.HasField("chosen")
    assert await find(database, id) == [first.record]
    # The same submission once more finds the retracted record: it does not come back.
    assert (await deployment.submit(database, recorded.record.feedback)).record == first.record


async def test_only_the_user_who_gave_it_may_retract(database: Database, deployment: Deployment) -> None:
    recorded = await deployment.submit(database, parts.thumb(deployment.generation(), user="ann"))
    with pytest.raises(errors.PermissionDenied, match="user_id"):
        await retract(database, recorded.record.feedback_id, user="bob")
    assert [record.state for record in await find(database, recorded.record.feedback_id)] == [
        FeedbackState.FEEDBACK_STATE_HELD
    ]
    with pytest.raises(errors.NotFound, match="feedback_id"):
        await retract(database, parts.new_id())


async def test_what_was_retracted_while_it_waited_is_never_joined(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    held = await deployment.submit(database, parts.comparison(a, b))
    await retract(database, held.record.feedback_id)
    assert await store(database, a, b) == []
    assert await published_comparisons(database) == []


async def test_records_come_in_the_order_asked_for(database: Database, deployment: Deployment) -> None:
    ids = [
        (await deployment.submit(database, parts.thumb(deployment.generation()))).record.feedback_id for _ in range(3)
    ]
    found = await find(database, ids[2], "unknown", ids[0])
    assert [record.feedback_id for record in found] == [ids[2], ids[0]]
