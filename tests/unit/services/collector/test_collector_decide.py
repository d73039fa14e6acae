"""Votes that change what earlier ones came to: superseded, outvoted, on a cycle, paired, quarantined, replayed."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select

from services.collector import guide, ledger, operate, outbox, raters, standing, tables
from services.collector.curation import CurationSettings, RaterId
from services.collector.database import Database
from services.collector.identity import Arrival
from services.collector.intake import Curator
from services.collector.rules import Rules
from services.collector.standing import everything
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment, find, published, retract, store
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonSource, ComparisonState, GenerationEvent, ThumbEvent
from thumbwheel.v1.preference_pb2 import AspectPreference, Comparison, Feedback, FeedbackRecord, FeedbackState

ACCEPTED = ComparisonState.COMPARISON_STATE_ACCEPTED
RETRACTED = ComparisonState.COMPARISON_STATE_RETRACTED


def three(deployment: Deployment) -> list[GenerationEvent]:
    """Three answers to one prompt."""
    prompt_id = parts.new_id()
    return [deployment.generation(text, prompt_id) for text in ("one", "two", "three")]


def stands(record: FeedbackRecord) -> tuple[str, str, float]:
    return FeedbackState.Name(record.state).removeprefix("FEEDBACK_STATE_"), record.reason, round(record.weight, 3)


def told(events: list[ComparisonEvent]) -> list[tuple[int, str, int, str]]:
    return [(event.state, event.comparison_id, event.revision, event.reason) for event in events]


async def thumbs(database: Database) -> list[ThumbEvent]:
    rows = await database.read(partial(outbox.waiting, limit=10_000))
    return [ThumbEvent.FromString(row.value) for row in rows if row.topic == topics.THUMBS]


async def test_the_last_judgement_of_a_user_stands(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    first = (await deployment.submit(database, parts.comparison(a, b, A))).record
    other = (await deployment.submit(database, parts.comparison(b, a, A))).record
    back = (await deployment.submit(database, parts.comparison(b, a, B))).record
    again = (await deployment.submit(database, parts.comparison(a, b, A))).record
    records = await find(database, first.feedback_id, other.feedback_id, back.feedback_id, again.feedback_id)
    assert [stands(record) for record in records] == [("SUPERSEDED", "superseded", 0.0)] * 3 + [
        ("ACCEPTED", "preferred", 1.0)
    ]
    assert [record.superseded_by for record in records] == [again.feedback_id] * 3 + [""]
    assert back.comparison_id == first.comparison_id == again.comparison_id != other.comparison_id
    one, two = first.comparison_id, other.comparison_id
    assert told(await published(database)) == [
        (ACCEPTED, one, 1, "preferred"),
        (RETRACTED, one, 2, "superseded"),
        (ACCEPTED, two, 1, "preferred"),
        (RETRACTED, two, 2, "superseded"),
        (ACCEPTED, one, 3, "preferred"),
    ], "saying it again changes nothing"
    await retract(database, again.feedback_id)
    states = [stands(record)[0] for record in await find(database, *(r.feedback_id for r in records))]
    assert states == ["SUPERSEDED"] * 3 + ["RETRACTED"], "what was corrected does not rise again"
    assert told(await published(database))[-1] == (RETRACTED, one, 4, "retracted_by_user")


async def test_what_waits_is_withdrawn_with_its_correction(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    first = (await deployment.submit(database, parts.comparison(a, b, A))).record
    second = (await deployment.submit(database, parts.comparison(a, b, B))).record
    await retract(database, second.feedback_id)
    found = await find(database, first.feedback_id, second.feedback_id)
    assert [stands(record)[0] for record in found] == ["SUPERSEDED", "RETRACTED"]
    assert found[0].superseded_by == second.feedback_id
    await store(database, a, b)
    assert await published(database) == []
    rows = await database.read(partial(outbox.waiting, limit=100))
    events = parts.feedback_records([row.value for row in rows if row.topic == topics.FEEDBACK])
    assert [stands(record)[0] for record in events] == ["HELD", "HELD", "SUPERSEDED", "RETRACTED"]


async def test_a_later_vote_that_closes_a_cycle_takes_earlier_ones_back(
    database: Database, deployment: Deployment
) -> None:
    one, two, three_ = three(deployment)
    await store(database, one, two, three_)
    first = (await deployment.submit(database, parts.comparison(one, two, user="ann"))).record
    second = (await deployment.submit(database, parts.comparison(two, three_, user="bob"))).record
    third = (await deployment.submit(database, parts.comparison(three_, one, user="cyd"))).record
    ids = [record.feedback_id for record in (first, second, third)]
    assert [stands(record) for record in await find(database, *ids)] == [("APART", "cycle", 0.0)] * 3
    assert told(await published(database)) == [
        (ACCEPTED, first.comparison_id, 1, "preferred"),
        (ACCEPTED, second.comparison_id, 1, "preferred"),
        (RETRACTED, first.comparison_id, 2, "cycle"),
        (RETRACTED, second.comparison_id, 2, "cycle"),
    ]
    await retract(database, third.feedback_id, user="cyd")
    assert [stands(record)[0] for record in await find(database, *ids)] == ["ACCEPTED", "ACCEPTED", "RETRACTED"]
    again = (await published(database))[4:]
    assert told(again) == [
        (ACCEPTED, first.comparison_id, 3, "preferred"),
        (ACCEPTED, second.comparison_id, 3, "preferred"),
    ]
    assert again[0].chosen.text == "one", "an acceptance says all of it anew"


async def test_opposite_thumbs_make_a_comparison_and_the_lone_one_is_told_of(
    database: Database, deployment: Deployment
) -> None:
    one, two, three_ = three(deployment)
    await store(database, one, two, three_)
    up = (await deployment.submit(database, parts.thumb(one, user="ann"))).record
    assert stands(up) == ("RECORDED", "unpaired_thumb", 1.0)
    down = (await deployment.submit(database, parts.thumb(two, up=False, user="bob"))).record
    ids = [up.feedback_id, down.feedback_id]
    assert [stands(record) for record in await find(database, *ids)] == [("ACCEPTED", "paired_thumbs", 1.0)] * 2
    [event] = await published(database)
    assert (event.chosen.text, event.rejected.text, list(event.feedback_ids)) == ("one", "two", ids)
    assert event.source == ComparisonSource.COMPARISON_SOURCE_THUMBS
    alone, paired = await thumbs(database)
    assert (alone.state, alone.response.text, alone.revision) == (ACCEPTED, "one", 1)
    assert (paired.state, paired.thumb_id, paired.reason) == (RETRACTED, alone.thumb_id, "paired_thumbs")
    await retract(database, down.feedback_id, user="bob")
    assert stands((await find(database, up.feedback_id))[0]) == ("RECORDED", "unpaired_thumb", 1.0)
    assert (await thumbs(database))[2].revision == 3
    assert told(await published(database))[1] == (RETRACTED, event.comparison_id, 2, "retracted_by_user")


async def test_what_is_alike_is_curated_together(database: Database, deployment: Deployment) -> None:
    """The same question in two prompts: votes against each other cancel."""
    words = "How long do I boil an egg so that it stays soft?"
    (a, b), (c, d) = (
        [deployment.generation(text, prompt_id, words) for text in "xy"]
        for prompt_id in (parts.new_id(), parts.new_id())
    )
    await store(database, a, b, c, d)
    first = (await deployment.submit(database, parts.comparison(a, b, A, user="ann"))).record
    second = (await deployment.submit(database, parts.comparison(c, d, B, user="bob"))).record
    found = await find(database, first.feedback_id, second.feedback_id)
    assert [stands(record) for record in found] == [("APART", "contested", 0.0)] * 2
    other = Deployment(deployment.key, tenant="other")
    prompt_id = parts.new_id()
    e, f = (other.generation(text, prompt_id, words) for text in "xy")
    await store(database, e, f)
    assert stands((await other.submit(database, parts.comparison(e, f))).record)[0] == "ACCEPTED", "its own tenant"


async def test_a_quarantined_rater_counts_for_nothing_until_released(
    database: Database, deployment: Deployment
) -> None:
    pairs = [deployment.pair() for _ in range(3)]
    await store(database, *(event for pair in pairs for event in pair))
    ids = [(await deployment.submit(database, parts.comparison(*pair))).record.feedback_id for pair in pairs]
    who = RaterId("default", "ann")
    await raters.quarantine(database, Rules(), who, standing.QUARANTINED, lambda: None)
    quarantined = ("QUARANTINED", "quarantined_manually", 0.0)
    assert [stands(record) for record in await find(database, *ids)] == [quarantined] * 3
    later = (await deployment.submit(database, parts.comparison(pairs[0][1], pairs[0][0]))).record
    assert stands(later) == quarantined
    await raters.quarantine(database, Rules(), who, standing.RELEASED, lambda: None)
    found = [stands(record)[0] for record in await find(database, *ids, later.feedback_id)]
    assert found == ["SUPERSEDED", "ACCEPTED", "ACCEPTED", "ACCEPTED"]
    states = [event.state for event in await published(database)]
    assert states == [ACCEPTED] * 3 + [RETRACTED] * 3 + [ACCEPTED] * 3


async def test_one_piece_of_feedback_is_released_by_itself(database: Database, deployment: Deployment) -> None:
    pairs = [deployment.pair() for _ in range(2)]
    await store(database, *(event for pair in pairs for event in pair))
    ids = [(await deployment.submit(database, parts.comparison(*pair))).record.feedback_id for pair in pairs]
    await raters.quarantine(database, Rules(), RaterId("default", "ann"), standing.QUARANTINED, lambda: None)
    await operate.release(database, Rules(), ids[0])
    assert [stands(record)[0] for record in await find(database, *ids)] == ["ACCEPTED", "QUARANTINED"]
    with pytest.raises(errors.NotFound):
        await operate.release(database, Rules(), "no")


async def test_a_control_question_is_not_learnt_from(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    known = (await deployment.submit(database, parts.comparison(a, b, B, user="teacher"))).record
    await operate.declare_gold(database, Rules(), known.feedback_id)
    other = (await deployment.submit(database, parts.comparison(b, a, A, user="ann"))).record
    found = await find(database, known.feedback_id, other.feedback_id)
    assert [stands(record) for record in found] == [("RECORDED", "gold", 0.0)] * 2
    assert [event.state for event in await published(database)] == [ACCEPTED, RETRACTED]
    [vote, again] = [vote for _, vote in database.read_now(lambda c: list(everything(c, learn_from_cut=False)))]
    assert (vote.gold, again.gold) == ("b", "a"), "the same response, whichever is shown first"
    tie = (await deployment.submit(database, parts.comparison(*deployment.pair(), TIE))).record
    with pytest.raises(errors.NotFound, match="with a winner"):
        await operate.declare_gold(database, Rules(), tie.feedback_id)


async def test_the_assessment_quarantines_who_contradicts_everybody(database: Database, deployment: Deployment) -> None:
    pairs = [deployment.pair(f"good {i}", f"bad {i}") for i in range(24)]
    await store(database, *(event for pair in pairs for event in pair))
    for pair in pairs:
        for user in ("ann", "bob", "cyd"):
            await deployment.submit(database, parts.comparison(*pair, A, user=user))
    liar = [(await deployment.submit(database, parts.comparison(*pair, B, user="liar"))).record for pair in pairs]
    woken: list[int] = []
    # All of these votes are given within a second: what is tested is agreement, not speed.
    rules = Rules(CurationSettings(burst_votes_per_minute=10_000))
    assert await raters.Assessor(database, rules, 60.0, lambda: woken.append(1)).once() >= 1
    found = await find(database, *(record.feedback_id for record in liar))
    assert {stands(record) for record in found} == {("QUARANTINED", "quarantined_unreliable", 0.0)}
    assert woken
    assert await raters.Assessor(database, rules, 60.0, lambda: None).once() == 0, "nothing new, nothing told"


async def test_people_who_agree_with_nobody_in_particular_are_left_alone(
    database: Database, deployment: Deployment
) -> None:
    """The demo's users: each judges pairs that nobody else sees, all by one rule."""
    for number in range(24):
        pair = deployment.pair(f"short {number}", f"a longer answer {number}")
        await store(database, *pair)
        await deployment.submit(database, parts.comparison(*pair, A, user=f"user-{number % 6}"))
    await raters.Assessor(database, Rules(), 60.0, lambda: None).once()
    rows = await database.read(lambda c: c.execute(select(tables.feedback.c.state, tables.feedback.c.weight)).all())
    assert {tuple(row) for row in rows} == {("ACCEPTED", 1.0)}


async def test_the_daily_cap_keeps_what_is_beyond_it_apart(database: Database, deployment: Deployment) -> None:
    curator = Curator(Rules(CurationSettings(user_votes_per_day=2)))
    checker = Checker(deployment.key, 1_000)
    found = []
    for _ in range(3):
        pair = deployment.pair()
        await database.write(partial(ledger.store, curator=curator, events=pair))
        submission = checker.check(parts.comparison(*pair), tenant="default")
        recorded = await parts.record(database, submission, curator=curator)
        found.append(stands(recorded.record))
    assert found == [("ACCEPTED", "preferred", 1.0)] * 2 + [("APART", "over_user_cap", 0.0)]


async def test_aspects_are_a_tenants_own_once_it_declares_them(database: Database, deployment: Deployment) -> None:
    def vote(aspect: str) -> Feedback:
        feedback = parts.comparison(*deployment.pair())
        feedback.comparison.aspects.append(AspectPreference(aspect=aspect, preference=A))
        return feedback

    await deployment.submit(database, vote("wit"))
    own = {"creativity": "Is it new?", "empathy": "Does it hear what was meant?"}
    second = await database.write(partial(guide.declare, tenant="default", own=own))
    assert (second.number, second.closed) == (1, True)
    assert [aspect.aspect for aspect in second.aspects][3:] == ["creativity", "empathy"]
    for aspect in ("creativity", "helpfulness"):
        await deployment.submit(database, vote(aspect))
    with pytest.raises(errors.InvalidArgument) as raised:
        await deployment.submit(database, vote("wit"))
    assert raised.value.field == "feedback.comparison.aspects[0].aspect"
    assert "creativity, empathy" in raised.value.remedy
    third = await database.write(partial(guide.declare, tenant="default", own={"creativity": "Is it new to you?"}))
    assert (third.number, third.version != second.version) == (2, True)
    assert await database.read(partial(guide.version, tenant="default", wanted=second.version)) == second
    assert (await database.write(partial(guide.publish, tenant="other"))).closed is False


async def test_the_same_record_replayed_gives_the_same_bytes(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    one, two, three_ = three(deployment)
    history: list[tuple[Feedback, Arrival]] = []
    votes = [
        parts.comparison(one, two, user="ann"),
        parts.thumb(three_, user="bob"),
        parts.comparison(two, three_, user="bob"),
        parts.thumb(two, up=False, user="cyd"),
        parts.comparison(three_, one, user="cyd"),
        parts.edit(one, "a better one", user="ann"),
        parts.comparison(three_, one, B, user="cyd"),
        parts.comment(one, "short"),
    ]
    history = [(vote, Arrival.now()) for vote in votes]

    async def play(into: Database) -> list[tuple[str, str, bytes, bytes]]:
        checker = Checker(deployment.key, 1_000)
        for number, (vote, arrival) in enumerate(history):
            if number == 1:
                await store(into, one, two, three_)
            submission = checker.check(vote, tenant="default")
            await parts.record(into, submission, arrival=arrival)
        await retract(into, history[4][1].feedback_id, user="cyd")
        rows = await into.read(partial(outbox.waiting, limit=1_000))
        return [(row.event_id, row.topic, row.key, row.value) for row in rows]

    first = await play(database)
    again = Database(f"sqlite:///{tmp_path / 'again.db'}")
    try:
        assert await play(again) == first
    finally:
        await asyncio.to_thread(again.close)
    assert len({event_id for event_id, *_ in first}) == len(first) > 15


async def test_a_propensity_that_was_not_noted_is_taken_as_the_client_says(
    database: Database, deployment: Deployment
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    vote = Comparison(a=a.generation.receipt, b=b.generation.receipt, preference=A, propensity=0.125)
    await deployment.submit(database, Feedback(idempotency_key="k", user_id="ann", comparison=vote))
    assert (await published(database))[0].propensity == 0.125
