"""What is published for training: comparisons and unpaired thumbs, accepted and retracted. No I/O.

Everything in an event follows from the record: replayed, it is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from services.collector.identity import derived
from thumbwheel.v1.events_pb2 import (
    ComparedResponse,
    ComparisonEvent,
    ComparisonSource,
    ComparisonState,
    GenerationEvent,
    ThumbEvent,
)
from thumbwheel.v1.preference_pb2 import AspectPreference, Feedback, Preference

COMPARISON, THUMB = "comparison", "thumb"

SampleEvent: TypeAlias = ComparisonEvent | ThumbEvent

_FLIPPED = {Preference.PREFERENCE_A: Preference.PREFERENCE_B, Preference.PREFERENCE_B: Preference.PREFERENCE_A}
_SOURCES = {
    "comparison": ComparisonSource.COMPARISON_SOURCE_VOTE,
    "edit": ComparisonSource.COMPARISON_SOURCE_EDIT,
    "thumb": ComparisonSource.COMPARISON_SOURCE_THUMBS,
}


class Sample(NamedTuple):
    """Something to learn from."""

    id: str
    kind: str
    prompt_id: str
    group: str
    reason: str
    weight: float
    votes: tuple[str, ...]
    chosen: str
    """Generation id of the better response, or of a thumb's only one; the feedback id where a user wrote the text."""
    rejected: str = ""


class Voted(NamedTuple):
    """The feedback that a sample rests on first, and when the last was committed, in microseconds."""

    body: Feedback
    kind: str
    received_at: int
    propensity: float | None


def accepted(
    sample: Sample, revision: int, tenant: str, voted: Voted, known: Mapping[str, GenerationEvent]
) -> SampleEvent:
    """Says that a sample is to be learnt from, with this weight. `known` holds its generations."""
    event = _event(sample.id, sample.kind, revision, tenant, sample.prompt_id, sample.votes, sample.reason)
    event.state = ComparisonState.COMPARISON_STATE_ACCEPTED
    event.weight = sample.weight
    event.received_at.CopyFrom(time_of(voted.received_at))
    source = known.get(sample.chosen) or known[sample.rejected]
    event.prompt.CopyFrom(source.prompt)
    event.prompt_token_ids.extend(source.prompt_token_ids)
    if isinstance(event, ThumbEvent):
        event.response.CopyFrom(_response(known[sample.chosen]))
        event.value = voted.body.thumb.value
        event.aspects.extend(voted.body.thumb.aspects)
        return event
    event.source = _SOURCES[voted.kind]
    event.rejected.CopyFrom(_response(known[sample.rejected]))
    if voted.kind == "edit":
        # A person's text has no generation: the feedback that holds it is its id.
        event.chosen.CopyFrom(ComparedResponse(generation_id=sample.chosen, text=voted.body.edit.text))
        event.demonstration = True
        return event
    event.chosen.CopyFrom(_response(known[sample.chosen]))
    if voted.kind == "comparison":
        vote = voted.body.comparison
        event.tie = vote.preference == Preference.PREFERENCE_TIE
        a_won = vote.preference == Preference.PREFERENCE_A or event.tie
        event.chosen_shown_first = a_won
        event.aspects.extend(_of_chosen(vote.aspects, a_won))
        if vote.HasField("strength"):
            event.strength = vote.strength
        if voted.propensity is not None:
            event.propensity = voted.propensity
    return event


def retracted(
    sample_id: str, kind: str, revision: int, tenant: str, prompt_id: str, votes: Sequence[str], reason: str
) -> SampleEvent:
    """Says that a sample is not to be learnt from any more. Carries no content: that was in its acceptance."""
    event = _event(sample_id, kind, revision, tenant, prompt_id, votes, reason)
    event.state = ComparisonState.COMPARISON_STATE_RETRACTED
    return event


def time_of(micros: int) -> Timestamp:
    """A timestamp of microseconds since the epoch."""
    time = Timestamp()
    time.FromMicroseconds(micros)
    return time


def _event(
    sample_id: str, kind: str, revision: int, tenant: str, prompt_id: str, votes: Sequence[str], reason: str
) -> SampleEvent:
    common: dict[str, Any] = {
        "event_id": derived(votes[0], sample_id, revision),
        "tenant": tenant,
        "prompt_id": prompt_id,
        "feedback_ids": votes,
        "reason": reason,
        "revision": revision,
    }
    if kind == THUMB:
        return ThumbEvent(thumb_id=sample_id, **common)
    return ComparisonEvent(comparison_id=sample_id, **common)


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
