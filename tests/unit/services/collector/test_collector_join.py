"""Which feedback may teach, once its generations are known; and what is published of it."""

from __future__ import annotations

import hashlib

import pytest

from services.collector import emit
from services.collector.emit import COMPARISON, THUMB, Sample, Voted
from services.collector.identity import derived
from services.collector.join import Arrived, Joined, join
from services.collector.submission import Checker, Submission
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonSource, ComparisonState, GenerationEvent, ThumbEvent
from thumbwheel.v1.preference_pb2 import (
    AspectPreference,
    Feedback,
    FeedbackState,
    ImplicitKind,
    ImplicitSignal,
    Preference,
    ThumbValue,
)

ID = parts.new_id()


def checked(deployment: Deployment, feedback: Feedback) -> Submission:
    return Checker(deployment.key, 1_000).check(feedback, tenant=deployment.tenant)


def arrived(*events: GenerationEvent) -> dict[str, Arrived]:
    return {
        e.event_id: Arrived(
            e.event_id, e.tenant, e.generation.prompt_id, hashlib.sha256(e.generation.text.encode()).digest(), True
        )
        for e in events
    }


def test_only_judgements_teach(deployment: Deployment) -> None:
    a, b = deployment.pair()
    signal = ImplicitSignal(receipt=a.generation.receipt, kind=ImplicitKind.IMPLICIT_KIND_COPIED)
    recorded = FeedbackState.FEEDBACK_STATE_RECORDED
    for feedback, expected in (
        (parts.comparison(a, b), Joined(recorded, "", teaches=True)),
        (parts.thumb(a), Joined(recorded, "", teaches=True)),
        (parts.edit(a, "Paris, France."), Joined(recorded, "", teaches=True)),
        (parts.comment(a, "Good."), Joined(recorded, "comment")),
        (Feedback(idempotency_key="k", user_id="ann", implicit=signal), Joined(recorded, "weak_evidence")),
    ):
        assert join(checked(deployment, feedback), arrived(a, b)) == expected


def test_it_waits_for_every_response(deployment: Deployment) -> None:
    a, b = deployment.pair()
    assert join(checked(deployment, parts.comparison(a, b)), arrived(a)) is None


def test_a_response_that_is_not_what_its_receipt_attests_is_kept_apart(deployment: Deployment) -> None:
    a, b = deployment.pair()
    submission = checked(deployment, parts.comparison(a, b))
    apart = Joined(FeedbackState.FEEDBACK_STATE_APART, "receipt_mismatch")
    altered = [GenerationEvent.FromString(b.SerializeToString()) for _ in range(3)]
    altered[0].generation.text = "Lyon."
    altered[1].tenant = "other"
    altered[2].generation.prompt_id = "other"
    for event in altered:
        assert join(submission, arrived(a, event)) == apart
    assert join(submission, arrived(a, b)) == Joined(FeedbackState.FEEDBACK_STATE_RECORDED, teaches=True)


def published(
    feedback: Feedback, chosen: str, *rejected: str, kind: str = COMPARISON, events: tuple[GenerationEvent, ...]
) -> emit.SampleEvent:
    sample = Sample("s", kind, events[0].generation.prompt_id, "g", "preferred", 0.5, (ID,), chosen, *rejected)
    voted = Voted(feedback, feedback.WhichOneof("kind") or "", 1_500_000, 0.125)
    return emit.accepted(sample, 3, "default", voted, {event.event_id: event for event in events})


@pytest.mark.parametrize(("preference", "chosen"), [(A, 0), (B, 1)])
def test_a_comparison_as_published(deployment: Deployment, preference: Preference.ValueType, chosen: int) -> None:
    pair = deployment.pair()
    feedback = parts.comparison(*pair, preference)
    feedback.comparison.strength = 0.75
    feedback.comparison.aspects.extend(
        [AspectPreference(aspect="helpfulness", preference=A), AspectPreference(aspect="fluency", preference=TIE)]
    )
    better, worse = pair[chosen], pair[1 - chosen]
    event = published(feedback, better.event_id, worse.event_id, events=pair)
    assert isinstance(event, ComparisonEvent)
    assert event.state == ComparisonState.COMPARISON_STATE_ACCEPTED
    assert (event.comparison_id, event.tenant, event.prompt_id) == ("s", "default", pair[0].generation.prompt_id)
    assert (event.prompt, list(event.prompt_token_ids)) == (better.prompt, [1, 2, 3])
    assert (event.chosen.text, event.rejected.text) == (better.generation.text, worse.generation.text)
    assert list(event.chosen.token_ids) == list(better.generation.token_ids)
    assert list(event.rejected.logprobs) == list(worse.generation.logprobs)
    assert event.chosen.spans[0].version == "policy-000001"
    assert event.chosen_shown_first is (chosen == 0)
    assert [(a.aspect, a.preference) for a in event.aspects] == [
        ("helpfulness", A if chosen == 0 else B),
        ("fluency", TIE),
    ]
    assert (event.weight, list(event.feedback_ids), event.reason, event.revision) == (0.5, [ID], "preferred", 3)
    assert (event.strength, event.propensity) == (0.75, 0.125)
    assert event.source == ComparisonSource.COMPARISON_SOURCE_VOTE
    assert not event.demonstration
    assert event.received_at.ToMicroseconds() == 1_500_000
    assert event.event_id == derived(ID, "s", 3)


def test_an_edit_is_a_demonstration_too(deployment: Deployment) -> None:
    original = deployment.generation("Pariss.")
    event = published(parts.edit(original, "Paris."), ID, original.event_id, events=(original,))
    assert isinstance(event, ComparisonEvent)
    assert (event.chosen.generation_id, event.chosen.text, list(event.chosen.token_ids)) == (ID, "Paris.", [])
    assert (event.rejected.generation_id, event.rejected.text) == (original.event_id, "Pariss.")
    assert (event.demonstration, event.source) == (True, ComparisonSource.COMPARISON_SOURCE_EDIT)
    assert not event.HasField("propensity")


def test_a_lone_thumb_as_published(deployment: Deployment) -> None:
    shown = deployment.generation("Paris.")
    event = published(parts.thumb(shown, up=False), shown.event_id, kind=THUMB, events=(shown,))
    assert isinstance(event, ThumbEvent)
    assert (event.thumb_id, event.response.text, event.value) == ("s", "Paris.", ThumbValue.THUMB_VALUE_DOWN)
    assert (event.prompt, event.weight, event.revision) == (shown.prompt, 0.5, 3)


def test_a_retraction_carries_no_content() -> None:
    event = emit.retracted("s", COMPARISON, 2, "default", "p", (ID,), "cycle")
    assert isinstance(event, ComparisonEvent)
    assert (event.state, event.reason, event.revision) == (ComparisonState.COMPARISON_STATE_RETRACTED, "cycle", 2)
    assert not event.HasField("chosen")
    assert event.event_id != emit.retracted("s", COMPARISON, 3, "default", "p", (ID,), "cycle").event_id


def test_derived_ids_are_uuid7_of_their_feedbacks_time() -> None:
    import uuid

    id = uuid.UUID(derived(ID, "anything"))
    assert (id.version, id.variant) == (7, uuid.RFC_4122)
    assert id.int >> 80 == uuid.UUID(ID).int >> 80
    assert str(id) == derived(ID, "anything") != derived(ID, "another")
