"""What feedback comes to once its generations are known."""

from __future__ import annotations

import pytest

from services.collector import join as joining
from services.collector.join import join
from services.collector.submission import Checker, Submission
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import BOTH_BAD, TIE, A, B, Deployment
from thumbwheel.v1.events_pb2 import ComparisonState, GenerationEvent
from thumbwheel.v1.preference_pb2 import AspectPreference, Feedback, FeedbackState, Preference


def checked(deployment: Deployment, feedback: Feedback) -> Submission:
    return Checker(deployment.key, 1_000).check(feedback, tenant=deployment.tenant)


@pytest.mark.parametrize(("preference", "chosen"), [(A, 0), (B, 1)])
def test_a_preference_becomes_a_comparison(
    deployment: Deployment, preference: Preference.ValueType, chosen: int
) -> None:
    pair = deployment.pair()
    feedback = parts.comparison(*pair, preference)
    feedback.comparison.aspects.extend(
        [
            AspectPreference(aspect="helpfulness", preference=A),
            AspectPreference(aspect="fluency", preference=TIE),
        ]
    )
    verdict = join("f1", checked(deployment, feedback), pair)
    assert verdict.state == FeedbackState.FEEDBACK_STATE_ACCEPTED
    event = verdict.comparison
    assert event is not None
    better, worse = pair[chosen], pair[1 - chosen]
    assert event.state == ComparisonState.COMPARISON_STATE_ACCEPTED
    assert (event.tenant, event.prompt_id) == ("default", better.generation.prompt_id)
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
    assert (event.weight, list(event.feedback_ids)) == (1.0, ["f1"])


@pytest.mark.parametrize(("preference", "reason"), [(TIE, "tie"), (BOTH_BAD, "both_bad")])
def test_ties_and_both_bad_are_kept_apart(
    deployment: Deployment, preference: Preference.ValueType, reason: str
) -> None:
    pair = deployment.pair()
    verdict = join("f1", checked(deployment, parts.comparison(*pair, preference)), pair)
    assert verdict == joining.Verdict(FeedbackState.FEEDBACK_STATE_APART, reason)


def test_two_responses_of_one_text_teach_nothing(deployment: Deployment) -> None:
    pair = deployment.pair("Paris.", "Paris.")
    verdict = join("f1", checked(deployment, parts.comparison(*pair)), pair)
    assert verdict == joining.Verdict(FeedbackState.FEEDBACK_STATE_APART, "same_text")


def test_an_edit_is_preferred_to_the_original(deployment: Deployment) -> None:
    event = deployment.generation("Pariss.")
    verdict = join("f1", checked(deployment, parts.edit(event, "Paris.")), [event])
    assert verdict.state == FeedbackState.FEEDBACK_STATE_ACCEPTED
    assert verdict.comparison is not None
    chosen, rejected = verdict.comparison.chosen, verdict.comparison.rejected
    assert (chosen.generation_id, chosen.text, list(chosen.token_ids)) == ("f1", "Paris.", [])
    assert (rejected.generation_id, rejected.text) == (event.generation.generation_id, "Pariss.")
    assert len(rejected.token_ids) == len("Pariss.")


def test_thumbs_and_comments_are_recorded(deployment: Deployment) -> None:
    event = deployment.generation()
    for feedback in (parts.thumb(event), parts.comment(event, "Good.")):
        assert join("f1", checked(deployment, feedback), [event]) == joining.Verdict(
            FeedbackState.FEEDBACK_STATE_RECORDED
        )


def test_a_response_that_is_not_what_its_receipt_attests_is_kept_apart(deployment: Deployment) -> None:
    a, b = deployment.pair()
    submission = checked(deployment, parts.comparison(a, b))
    apart = joining.Verdict(FeedbackState.FEEDBACK_STATE_APART, "receipt_mismatch")
    altered = [GenerationEvent.FromString(b.SerializeToString()) for _ in range(3)]
    altered[0].generation.text = "Lyon."
    altered[1].tenant = "other"
    altered[2].generation.prompt_id = "other"
    for event in altered:
        assert join("f1", submission, [a, event]) == apart
    assert join("f1", submission, [a, b]).state == FeedbackState.FEEDBACK_STATE_ACCEPTED
