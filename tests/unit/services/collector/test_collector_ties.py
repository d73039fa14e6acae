"""Ties that are published, where they are to be: as what they are, until they are taken back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.collector.curation import CurationSettings
from services.collector.database import Database
from services.collector.exchange.exporting import Exported, export_file
from services.collector.exchange.report import refusals
from services.collector.intake import Curator
from services.collector.records import Recorded
from services.collector.rules import Rules
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment, published, store
from thumbwheel.v1.events_pb2 import ComparisonState
from thumbwheel.v1.preference_pb2 import Feedback


@pytest.fixture
def curator() -> Curator:
    """One that has ties published."""
    return Curator(Rules(CurationSettings(publish_ties=True)))


async def submit(database: Database, deployment: Deployment, curator: Curator, feedback: Feedback) -> Recorded:
    submission = Checker(deployment.key, 1_000).check(feedback, tenant=deployment.tenant)
    return await parts.record(database, submission, curator=curator)


async def test_a_tie_is_published_as_such_with_the_first_as_chosen(
    database: Database, deployment: Deployment, curator: Curator
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    vote = parts.comparison(a, b, TIE)
    vote.comparison.aspects.add(aspect="fluency", preference=B)
    recorded = await submit(database, deployment, curator, vote)
    assert (recorded.state, recorded.record.reason) == ("APART", "tie")
    [event] = await published(database)
    assert (event.tie, event.reason, event.weight) == (True, "tie", 1.0)
    assert event.state == ComparisonState.COMPARISON_STATE_ACCEPTED
    assert (event.chosen.generation_id, event.rejected.generation_id) == (a.event_id, b.event_id)
    assert event.chosen_shown_first
    assert [(one.aspect, one.preference) for one in event.aspects] == [("fluency", B)], "A is the chosen one"
    assert recorded.record.comparison_id == event.comparison_id
    assert list(event.feedback_ids) == [recorded.record.feedback_id]


async def test_a_later_preference_takes_the_tie_back(
    database: Database, deployment: Deployment, curator: Curator
) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    await submit(database, deployment, curator, parts.comparison(a, b, TIE))
    await submit(database, deployment, curator, parts.comparison(a, b, A))
    tie, taken_back, preferred = await published(database)
    assert taken_back.state == ComparisonState.COMPARISON_STATE_RETRACTED
    assert taken_back.comparison_id == tie.comparison_id != preferred.comparison_id
    assert not preferred.tie


async def test_what_cannot_be_told_apart_is_no_tie_to_learn_from(
    database: Database, deployment: Deployment, curator: Curator
) -> None:
    for pair in (deployment.pair("same", "same"), deployment.pair("words", " ")):
        await store(database, *pair)
        await submit(database, deployment, curator, parts.comparison(*pair, TIE))
    assert await published(database) == []


async def test_no_more_ties_of_a_prompt_are_published_than_comparisons_may_be(
    database: Database, deployment: Deployment, curator: Curator
) -> None:
    few = dataclasses.replace(curator, rules=Rules(CurationSettings(publish_ties=True, group_votes=2)))
    a, b = deployment.pair()
    await store(database, a, b)
    for user in ("ann", "bob", "eve", "joe"):
        await submit(database, deployment, few, parts.comparison(a, b, TIE, user=user))
    events = await published(database)
    stands = {event.comparison_id: event.state for event in events}
    assert list(stands.values()).count(ComparisonState.COMPARISON_STATE_ACCEPTED) == 2


async def test_an_export_has_no_ties(
    database: Database, deployment: Deployment, curator: Curator, tmp_path: Path
) -> None:
    tied, judged = deployment.pair(), deployment.pair()
    await store(database, *tied, *judged)
    await submit(database, deployment, curator, parts.comparison(*tied, TIE))
    await submit(database, deployment, curator, parts.comparison(*judged, A))
    with refusals(tmp_path / "refused.jsonl") as refused:
        done = await export_file(database, "default", tmp_path / "out.jsonl", "trl", None, refused, lambda _: None)
    assert done == Exported(1, 0)
