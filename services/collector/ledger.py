"""The record of feedback: what each operation reads and writes, in one transaction together with what is published.

Every change of state is told on the `feedback` topic, with the record as it then is: feedback that waits for its
generations is told of twice, each time with its own event id and the same feedback id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection, Row, insert, select, update
from uuid_utils import uuid7

from services.collector import outbox
from services.collector.join import Verdict, join, retraction
from services.collector.rights import tombstones
from services.collector.submission import Submission, receipts_of
from services.collector.tables import feedback, feedback_generations, generations, held
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import FeedbackEvent, GenerationEvent
from thumbwheel.v1.policy_pb2 import ReceiptClaims
from thumbwheel.v1.preference_pb2 import Feedback, FeedbackRecord, FeedbackState

_PREFIX = "FEEDBACK_STATE_"
HELD = Verdict(FeedbackState.FEEDBACK_STATE_HELD, "awaiting_generation")


class Recorded(NamedTuple):
    """What became of feedback in this operation. `state` is a name without its prefix."""

    record: FeedbackRecord
    kind: str
    state: str
    changed: bool


def submit(connection: Connection, submission: Submission, traceparent: str = "") -> Recorded:
    """Records feedback, and joins it where its generations have arrived; else it is held.

    The same submission again changes nothing. Raises `errors.Conflict` where the key was used with another body, and
    `errors.FailedPrecondition` where the user, or what it is about, was forgotten.
    """
    body = submission.feedback
    tombstones.refuse(connection, submission)
    before = connection.execute(
        select(feedback).where(
            feedback.c.tenant == submission.tenant, feedback.c.idempotency_key == body.idempotency_key
        )
    ).one_or_none()
    if before is not None:
        if before.body_sha256 != submission.body_sha256:
            raise errors.Conflict(
                f"feedback.idempotency_key: {body.idempotency_key!r} was used before with other content.",
                remedy="Use a new key for new feedback, and send a repeated one unchanged.",
            )
        return Recorded(_record(before), before.kind, before.state, changed=False)
    record = FeedbackRecord(
        feedback_id=str(uuid7()), tenant=submission.tenant, feedback=body, received_at=_time(outbox.now_micros())
    )
    known = _generations(connection, [claims.generation_id for claims in submission.claims])
    verdict = _verdict(record.feedback_id, submission, known)
    _stand(record, verdict)
    connection.execute(
        insert(feedback),
        {
            "feedback_id": record.feedback_id,
            "tenant": record.tenant,
            "idempotency_key": body.idempotency_key,
            "body_sha256": submission.body_sha256,
            "user_id": body.user_id,
            "kind": submission.kind,
            "body": body.SerializeToString(deterministic=True),
            "prompt_id": submission.prompt_id,
            "state": _name(record.state),
            "reason": record.reason,
            "comparison_id": record.comparison_id or None,
            "received_at": record.received_at.ToMicroseconds(),
            "consent": submission.consent,
        },
    )
    connection.execute(
        insert(feedback_generations),
        [
            {"feedback_id": record.feedback_id, "place": place, "generation_id": claims.generation_id}
            for place, claims in enumerate(submission.claims)
        ],
    )
    _tell(connection, record, submission.prompt_id, verdict, traceparent)
    return Recorded(record, submission.kind, _name(record.state), changed=True)


def retract(connection: Connection, feedback_id: str, user_id: str, tenant: str, traceparent: str = "") -> Recorded:
    """Takes feedback back. Again changes nothing. Raises `errors.NotFound` and `errors.PermissionDenied`."""
    row = connection.execute(
        select(feedback).where(feedback.c.tenant == tenant, feedback.c.feedback_id == feedback_id)
    ).one_or_none()
    if row is None:
        raise errors.NotFound(
            f"feedback_id: there is no feedback {feedback_id!r}.", remedy="Send the id that SubmitFeedback returned."
        )
    if row.user_id != user_id:
        raise errors.PermissionDenied(
            "user_id: is not the user who gave this feedback.", remedy="Retract it as the user who gave it."
        )
    record = _record(row)
    if record.state == FeedbackState.FEEDBACK_STATE_RETRACTED:
        return Recorded(record, row.kind, row.state, changed=False)
    record.state, record.reason = FeedbackState.FEEDBACK_STATE_RETRACTED, "retracted_by_user"
    state = _name(record.state)
    connection.execute(
        update(feedback).where(feedback.c.feedback_id == feedback_id).values(state=state, reason=record.reason)
    )
    comparison = None
    if record.comparison_id:
        comparison = retraction(record.comparison_id, feedback_id, tenant, row.prompt_id)
    _tell(connection, record, row.prompt_id, Verdict(record.state, record.reason, comparison), traceparent)
    return Recorded(record, row.kind, state, changed=True)


def find(connection: Connection, feedback_ids: Sequence[str], tenant: str) -> list[FeedbackRecord]:
    """Those records of the tenant that exist, in the order asked for."""
    rows = connection.execute(
        select(feedback).where(feedback.c.tenant == tenant, feedback.c.feedback_id.in_(feedback_ids))
    )
    by_id = {row.feedback_id: row for row in rows}
    return [_record(by_id[id]) for id in feedback_ids if id in by_id]


def store(connection: Connection, events: Iterable[GenerationEvent]) -> list[Recorded]:
    """Stores generations, once each, and joins the feedback that waited for them. Returns what was joined."""
    arrived: dict[str, GenerationEvent] = {}
    for event in events:
        arrived.setdefault(event.generation.generation_id, event)
    ids = list(arrived)
    present = select(generations.c.generation_id).where(generations.c.generation_id.in_(ids))
    for id in connection.execute(present).scalars():
        del arrived[id]
    if not arrived:
        return []
    now = outbox.now_micros()
    connection.execute(
        insert(generations),
        [
            {
                "generation_id": id,
                "tenant": event.tenant,
                "prompt_id": event.generation.prompt_id,
                "event": event.SerializeToString(),
                "stored_at": now,
                "user_id": event.user_id,
            }
            for id, event in arrived.items()
        ],
    )
    return list(_join_held(connection, list(arrived)))


def _join_held(connection: Connection, generation_ids: Sequence[str]) -> Iterator[Recorded]:
    refers = select(feedback_generations.c.feedback_id).where(feedback_generations.c.generation_id.in_(generation_ids))
    waiting = select(feedback).where(held, feedback.c.feedback_id.in_(refers)).order_by(feedback.c.feedback_id)
    rows = connection.execute(waiting).all()
    submissions = [_submission(row) for row in rows]
    wanted = {claims.generation_id for submission in submissions for claims in submission.claims}
    known = _generations(connection, list(wanted))
    for row, submission in zip(rows, submissions, strict=True):
        verdict = _verdict(row.feedback_id, submission, known)
        if verdict is HELD:
            continue
        record = _record(row)
        _stand(record, verdict)
        connection.execute(
            update(feedback)
            .where(feedback.c.feedback_id == row.feedback_id)
            .values(state=_name(record.state), reason=record.reason, comparison_id=record.comparison_id or None)
        )
        _tell(connection, record, row.prompt_id, verdict)
        yield Recorded(record, row.kind, _name(record.state), changed=True)


def _verdict(feedback_id: str, submission: Submission, known: dict[str, GenerationEvent]) -> Verdict:
    if any(claims.generation_id not in known for claims in submission.claims):
        return HELD
    return join(feedback_id, submission, [known[claims.generation_id] for claims in submission.claims])


def _stand(record: FeedbackRecord, verdict: Verdict) -> None:
    record.state, record.reason = verdict.state, verdict.reason
    if verdict.comparison is not None:
        record.comparison_id = verdict.comparison.comparison_id


def _generations(connection: Connection, ids: Sequence[str]) -> dict[str, GenerationEvent]:
    rows = connection.execute(
        select(generations.c.generation_id, generations.c.event).where(generations.c.generation_id.in_(ids))
    )
    return {id: GenerationEvent.FromString(event) for id, event in rows}


def _tell(
    connection: Connection, record: FeedbackRecord, prompt_id: str, verdict: Verdict, traceparent: str = ""
) -> None:
    event = FeedbackEvent(event_id=str(uuid7()), record=record)
    events = [outbox.Event(event.event_id, topics.FEEDBACK, prompt_id, event, traceparent)]
    comparison = verdict.comparison
    if comparison is not None:
        comparison.received_at.CopyFrom(record.received_at)
        events.append(outbox.Event(comparison.event_id, topics.COMPARISONS, prompt_id, comparison, traceparent))
    outbox.add(connection, events)


def _record(row: Row[Any]) -> FeedbackRecord:
    return FeedbackRecord(
        feedback_id=row.feedback_id,
        tenant=row.tenant,
        feedback=Feedback.FromString(row.body),
        state=FeedbackState.Value(_PREFIX + row.state),
        reason=row.reason,
        comparison_id=row.comparison_id or "",
        received_at=_time(row.received_at),
    )


def _submission(row: Row[Any]) -> Submission:
    """The submission behind a record: its receipts were verified before it was recorded."""
    body = Feedback.FromString(row.body)
    claims = tuple(ReceiptClaims.FromString(receipt.claims) for _, receipt in receipts_of(body))
    return Submission(row.tenant, body, row.body_sha256, row.kind, claims, row.consent)


def _name(state: FeedbackState.ValueType) -> str:
    return FeedbackState.Name(state).removeprefix(_PREFIX)


def _time(micros: int) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(micros)
    return time
