"""A row of feedback as the record that callers and watchers see."""

from __future__ import annotations

from typing import Any, NamedTuple

from services.collector.emit import time_of
from services.collector.identity import derived
from services.collector.outbox import Event
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import FeedbackEvent
from thumbwheel.v1.preference_pb2 import Feedback, FeedbackRecord, FeedbackState

_PREFIX = "FEEDBACK_STATE_"
_STATES = {name.removeprefix(_PREFIX): number for name, number in FeedbackState.items()}


class Recorded(NamedTuple):
    """What became of feedback in this operation. `state` is a name without its prefix."""

    record: FeedbackRecord
    kind: str
    state: str
    changed: bool
    revision: int


def recorded(row: Any, *, changed: bool) -> Recorded:
    """What became of the feedback in this row."""
    return Recorded(record_of(row), row.kind, row.state, changed, row.revision)


def new(values: dict[str, Any], body: Feedback) -> Recorded:
    """What becomes of feedback that is recorded in this operation, in a row of these values."""
    record = FeedbackRecord(
        feedback_id=values["feedback_id"],
        tenant=values["tenant"],
        feedback=body,
        state=_STATES[values["state"]],
        reason=values["reason"],
        comparison_id=values["comparison_id"],
        received_at=time_of(values["received_at"]),
        weight=values["weight"],
        superseded_by=values["superseded_by"],
    )
    return Recorded(record, values["kind"], values["state"], True, values["revision"])


def record_of(row: Any) -> FeedbackRecord:
    """The record of a row."""
    return FeedbackRecord(
        feedback_id=row.feedback_id,
        tenant=row.tenant,
        feedback=Feedback.FromString(row.body),
        state=_STATES[row.state],
        reason=row.reason,
        comparison_id=row.comparison_id or "",
        received_at=time_of(row.received_at),
        weight=row.weight,
        superseded_by=row.superseded_by or "",
    )


def event_of(told: Recorded, prompt_id: str, traceparent: str = "") -> Event:
    """What is published of it. Each time that it is told of has an id of its own."""
    event_id = told_id(told.record.feedback_id, told.revision)
    event = FeedbackEvent(event_id=event_id, record=told.record)
    return Event(event_id, topics.FEEDBACK, prompt_id, event, traceparent)


def told_id(feedback_id: str, revision: int) -> str:
    """The event that told of feedback for the `revision`th time."""
    return derived(feedback_id, "told", revision)


def name_of(state: FeedbackState.ValueType) -> str:
    """A state without its prefix, as it is kept."""
    return FeedbackState.Name(state).removeprefix(_PREFIX)
