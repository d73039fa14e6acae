"""What a piece of feedback comes to, once the generations that it is about are known. No I/O.

comparison, A or B  → ACCEPTED, a comparison to learn from      thumb, comment, implicit → RECORDED
comparison, tie or both bad → APART, never a win                edit → ACCEPTED, edited text over the original
a response that is not what its receipt attests, two of one text, or no consent → APART
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uuid_utils import uuid7

from services.collector.submission import Submission
from thumbwheel.v1.events_pb2 import ComparedResponse, ComparisonEvent, ComparisonState, GenerationEvent
from thumbwheel.v1.policy_pb2 import ReceiptClaims
from thumbwheel.v1.preference_pb2 import AspectPreference, FeedbackState, Preference

TIE = "tie"
BOTH_BAD = "both_bad"
SAME_TEXT = "same_text"
MISMATCH = "receipt_mismatch"
NO_CONSENT = "no_consent"

_FLIPPED = {Preference.PREFERENCE_A: Preference.PREFERENCE_B, Preference.PREFERENCE_B: Preference.PREFERENCE_A}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where the feedback stands, why, and the comparison that is derived from it, if any."""

    state: FeedbackState.ValueType
    reason: str = ""
    comparison: ComparisonEvent | None = None


def join(feedback_id: str, submission: Submission, generations: Sequence[GenerationEvent]) -> Verdict:
    """The verdict on feedback whose generations are all there, in the order of its receipts."""
    for claims, generation in zip(submission.claims, generations, strict=True):
        if not _attested(claims, generation):
            return Verdict(FeedbackState.FEEDBACK_STATE_APART, MISMATCH)
    # What was said when the generation came in is written into its event: see `rights.admission`.
    if not submission.consent or any(event.HasField("consent") and not event.consent for event in generations):
        return Verdict(FeedbackState.FEEDBACK_STATE_APART, NO_CONSENT)
    match submission.kind:
        case "comparison":
            return _comparison(feedback_id, submission, generations[0], generations[1])
        case "edit":
            return _edit(feedback_id, submission, generations[0])
        case _:
            return Verdict(FeedbackState.FEEDBACK_STATE_RECORDED)


def retraction(comparison_id: str, feedback_id: str, tenant: str, prompt_id: str) -> ComparisonEvent:
    """Says that a comparison is not to be learnt from any more. Carries no content: that was in its acceptance."""
    return ComparisonEvent(
        event_id=str(uuid7()),
        comparison_id=comparison_id,
        state=ComparisonState.COMPARISON_STATE_RETRACTED,
        tenant=tenant,
        prompt_id=prompt_id,
        feedback_ids=[feedback_id],
    )


def _attested(claims: ReceiptClaims, event: GenerationEvent) -> bool:
    return (
        event.tenant == claims.tenant
        and event.generation.prompt_id == claims.prompt_id
        and hashlib.sha256(event.generation.text.encode()).digest() == claims.response_sha256
    )


def _comparison(feedback_id: str, submission: Submission, a: GenerationEvent, b: GenerationEvent) -> Verdict:
    vote = submission.feedback.comparison
    if vote.preference == Preference.PREFERENCE_TIE:
        return Verdict(FeedbackState.FEEDBACK_STATE_APART, TIE)
    if vote.preference == Preference.PREFERENCE_BOTH_BAD:
        return Verdict(FeedbackState.FEEDBACK_STATE_APART, BOTH_BAD)
    if a.generation.text == b.generation.text:
        return Verdict(FeedbackState.FEEDBACK_STATE_APART, SAME_TEXT)
    a_won = vote.preference == Preference.PREFERENCE_A
    chosen, rejected = (a, b) if a_won else (b, a)
    event = _accepted(feedback_id, submission, chosen)
    event.chosen.CopyFrom(_response(chosen))
    event.rejected.CopyFrom(_response(rejected))
    event.chosen_shown_first = a_won
    event.aspects.extend(_of_chosen(vote.aspects, a_won))
    return Verdict(FeedbackState.FEEDBACK_STATE_ACCEPTED, comparison=event)


def _edit(feedback_id: str, submission: Submission, original: GenerationEvent) -> Verdict:
    event = _accepted(feedback_id, submission, original)
    # A person's text has no generation: the feedback that holds it is its id.
    event.chosen.CopyFrom(ComparedResponse(generation_id=feedback_id, text=submission.feedback.edit.text))
    event.rejected.CopyFrom(_response(original))
    return Verdict(FeedbackState.FEEDBACK_STATE_ACCEPTED, comparison=event)


def _accepted(feedback_id: str, submission: Submission, generation: GenerationEvent) -> ComparisonEvent:
    return ComparisonEvent(
        event_id=str(uuid7()),
        comparison_id=str(uuid7()),
        state=ComparisonState.COMPARISON_STATE_ACCEPTED,
        tenant=submission.tenant,
        prompt_id=submission.prompt_id,
        prompt=generation.prompt,
        prompt_token_ids=generation.prompt_token_ids,
        weight=1.0,
        feedback_ids=[feedback_id],
    )


def _response(event: GenerationEvent) -> ComparedResponse:
    generation = event.generation
    return ComparedResponse(
        generation_id=generation.generation_id,
        text=generation.text,
        token_ids=generation.token_ids,
        logprobs=generation.logprobs,
        spans=generation.spans,
    )


def _of_chosen(aspects: Sequence[AspectPreference], a_won: bool) -> Iterator[AspectPreference]:
    """The verdicts with A standing for the chosen response."""
    for aspect in aspects:
        preference = aspect.preference if a_won else _FLIPPED.get(aspect.preference, aspect.preference)
        yield AspectPreference(aspect=aspect.aspect, preference=preference)
