"""The record of feedback: what each operation reads and writes, in one transaction together with what is published.

    submit ──▶ known key?  ──▶ insert ──▶ generations there?  no: HELD, until `store` brings them
                                              │ yes
                                              ▼
                                    join ──▶ the prompt's group ──▶ decide ──▶ outbox

Every change of state is told on the `feedback` topic, with the record as it then is and an event id of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from services.collector import guide, outbox, picked, records, tallies
from services.collector.decide import decide
from services.collector.groups import Groups
from services.collector.identity import Arrival, derived
from services.collector.join import AWAITING, Arrived, Joined, join
from services.collector.judgement import Judgement, judgement_of
from services.collector.records import Recorded
from services.collector.rights import tombstones
from services.collector.rules import Rules
from services.collector.submission import Submission, receipts_of
from services.collector.tables import feedback, feedback_generations, generations, held
from services.collector.tables import outbox as outbox_table
from thumbwheel import errors
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import FinishReason, ReceiptClaims
from thumbwheel.v1.preference_pb2 import Feedback, FeedbackRecord

HELD, RETRACTED, RETRACTED_BY_USER, WITHDRAWN = "HELD", "RETRACTED", "retracted_by_user", "withdrawn"


# Built once: building a statement takes longer than running it.
_BY_KEY = select(feedback).where(
    feedback.c.tenant == bindparam("of_tenant"), feedback.c.idempotency_key == bindparam("of_key")
)
_FIRST_SAMPLE = (
    select(feedback.c.sample_id)
    .where(
        feedback.c.tenant == bindparam("of_tenant"),
        feedback.c.user_id == bindparam("of_user"),
        feedback.c.item == bindparam("of_item"),
        feedback.c.outcome == bindparam("of_outcome"),
    )
    .order_by(feedback.c.feedback_id)
    .limit(1)
)
_ARRIVED = select(*(generations.c[name] for name in Arrived._fields)).where(
    generations.c.generation_id.in_(bindparam("of_ids", expanding=True))
)


@dataclass(frozen=True, slots=True)
class Curator:
    """By what feedback is judged, and which prompts are alike. For one thread: that of the database's writer."""

    rules: Rules = field(default_factory=Rules)
    groups: Groups = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", Groups(self.rules.curation))


def submit(
    connection: Connection,
    curator: Curator,
    submission: Submission,
    traceparent: str = "",
    arrival: Arrival | None = None,
) -> Recorded:
    """Records feedback, and joins it where its generations have arrived; else it is held.

    The same submission again changes nothing. `arrival` is given where a record is replayed. Raises `errors.Conflict`
    where the key was used with another body, and `errors.InvalidArgument` for guidelines, aspects or a propensity that
    this tenant does not have, and `errors.FailedPrecondition` where the user, or what it is about, was forgotten.
    """
    body = submission.feedback
    key = {"of_tenant": submission.tenant, "of_key": body.idempotency_key}
    before = connection.execute(_BY_KEY, key).one_or_none()
    if before is not None:
        if before.body_sha256 != submission.body_sha256:
            raise errors.Conflict(
                f"feedback.idempotency_key: {body.idempotency_key!r} was used before with other content.",
                remedy="Use a new key for new feedback, and send a repeated one unchanged.",
            )
        return records.recorded(before, changed=False)
    tombstones.refuse(connection, submission)
    guide.check(connection, submission)
    arrival = arrival or Arrival.now()
    id = arrival.feedback_id
    joined = join(submission, _arrived(connection, [claims.generation_id for claims in submission.claims]))
    stands: dict[str, Any] = {"state": HELD, "reason": AWAITING, "joined": None, "group_id": None}
    if joined is not None and joined.teaches:
        stands |= {"joined": "", "group_id": _group(connection, curator, submission)}
    elif joined is not None:
        stands |= {"state": records.name_of(joined.state), "reason": joined.reason, "joined": joined.reason}
    row = _insert(connection, submission, arrival, stands)
    if stands["group_id"] is not None:
        groups = [stands["group_id"]]
        all_told = decide(connection, curator.rules, submission.tenant, groups, new=[id], traceparent=traceparent)
        return next(one for one in all_told if one.record.feedback_id == id)
    told = records.recorded(row, changed=True)
    outbox.add(connection, [records.event_of(told, submission.prompt_id, traceparent)])
    return told


def retract(
    connection: Connection, curator: Curator, feedback_id: str, user_id: str, tenant: str, traceparent: str = ""
) -> Recorded:
    """Takes feedback back, and with it what it had superseded. Again changes nothing.

    Raises `errors.NotFound` and `errors.PermissionDenied`.
    """
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
    if row.state == RETRACTED:
        return records.recorded(row, changed=False)
    _set(connection, feedback_id, state=RETRACTED, reason=RETRACTED_BY_USER, weight=0.0)
    if row.item is not None:
        _withdraw_older(connection, row, traceparent)
    [row] = _rows(connection, [feedback_id])
    told = records.recorded(row, changed=True)
    outbox.add(connection, [records.event_of(told, row.prompt_id, traceparent)])
    if row.group_id is not None:
        decide(connection, curator.rules, tenant, [row.group_id], traceparent=traceparent)
    return told


def _withdraw_older(connection: Connection, retracted: Row[Any], traceparent: str) -> None:
    """Who corrected a judgement and takes the correction back has none: the earlier one does not rise again."""
    older = (feedback.c.received_at < retracted.received_at) | (
        (feedback.c.received_at == retracted.received_at) & (feedback.c.feedback_id < retracted.feedback_id)
    )
    same = (feedback.c.tenant == retracted.tenant) & (feedback.c.user_id == retracted.user_id)
    earlier = same & (feedback.c.item == retracted.item) & older & (feedback.c.state != RETRACTED)
    waited = list(connection.execute(select(feedback.c.feedback_id).where(earlier, held)).scalars())
    connection.execute(update(feedback).where(earlier).values(joined=WITHDRAWN))
    for id in waited:
        _set(connection, id, state="SUPERSEDED", reason="superseded", superseded_by=retracted.feedback_id)
    told = [(records.recorded(row, changed=True), row.prompt_id) for row in _rows(connection, waited)]
    outbox.add(connection, [records.event_of(one, prompt_id, traceparent) for one, prompt_id in told])


def find(connection: Connection, feedback_ids: Sequence[str], tenant: str) -> list[FeedbackRecord]:
    """Those records of the tenant that exist, in the order asked for."""
    rows = connection.execute(
        select(feedback).where(feedback.c.tenant == tenant, feedback.c.feedback_id.in_(feedback_ids))
    )
    by_id = {row.feedback_id: row for row in rows}
    return [records.record_of(by_id[id]) for id in feedback_ids if id in by_id]


def store(connection: Connection, curator: Curator, events: Iterable[GenerationEvent]) -> list[Recorded]:
    """Stores generations, once each, and joins the feedback that waited for them. Returns what was joined."""
    arrived: dict[str, GenerationEvent] = {}
    for event in events:
        arrived.setdefault(event.generation.generation_id, event)
    present = select(generations.c.generation_id).where(generations.c.generation_id.in_(list(arrived)))
    for id in connection.execute(present).scalars():
        del arrived[id]
    if not arrived:
        return []
    now = outbox.now_micros()
    connection.execute(insert(generations), [_generation(event, now) for event in arrived.values()])
    return _join_held(connection, curator, list(arrived))


def _join_held(connection: Connection, curator: Curator, generation_ids: Sequence[str]) -> list[Recorded]:
    refers = select(feedback_generations.c.feedback_id).where(feedback_generations.c.generation_id.in_(generation_ids))
    waiting = select(feedback).where(held, feedback.c.feedback_id.in_(refers)).order_by(feedback.c.feedback_id)
    submissions = [(row.feedback_id, _submission(row)) for row in connection.execute(waiting).all()]
    wanted = {claims.generation_id for _, submission in submissions for claims in submission.claims}
    known = _arrived(connection, wanted)
    ready = [(id, submission, join(submission, known)) for id, submission in submissions]
    return _settle(connection, curator, [(id, one, joined) for id, one, joined in ready if joined is not None])


def _traceparents(connection: Connection, ready: Sequence[tuple[str, Submission, Joined]]) -> dict[str, str]:
    """The traces of the calls that submitted this feedback, by its id: they are kept with what was told of it then."""
    first = {records.told_id(id, 1): id for id, _, _ in ready}
    keys = {submission.prompt_id.encode() for _, submission, _ in ready}
    told = select(outbox_table.c.event_id, outbox_table.c.traceparent).where(
        outbox_table.c.key.in_(keys), outbox_table.c.traceparent != ""
    )
    return {first[event_id]: carried for event_id, carried in connection.execute(told) if event_id in first}


def _settle(
    connection: Connection, curator: Curator, ready: Sequence[tuple[str, Submission, Joined]]
) -> list[Recorded]:
    """Feedback whose generations are there: what may teach is curated, the rest told of as it is."""
    teaching: dict[tuple[str, str], list[str]] = {}
    aside: list[str] = []
    for id, submission, joined in ready:
        if joined.teaches:
            group = _group(connection, curator, submission)
            teaching.setdefault((submission.tenant, group), []).append(id)
            connection.execute(
                update(feedback).where(feedback.c.feedback_id == id).values(joined="", group_id=group, reason="")
            )
        else:
            aside.append(id)
            _set(connection, id, state=records.name_of(joined.state), reason=joined.reason, joined=joined.reason)
    told = [records.recorded(row, changed=True) for row in _rows(connection, aside)]
    prompt_ids = {id: submission.prompt_id for id, submission, _ in ready}
    traces = _traceparents(connection, ready) if ready else {}
    outbox.add(
        connection,
        [
            records.event_of(one, prompt_ids[one.record.feedback_id], traces.get(one.record.feedback_id, ""))
            for one in told
        ],
    )
    for (tenant, group), ids in teaching.items():
        # What several decide together is of the trace of the last of them.
        changed = decide(connection, curator.rules, tenant, [group], new=ids, traceparent=traces.get(ids[-1], ""))
        told += [one for one in changed if one.record.feedback_id in prompt_ids]
    return sorted(told, key=lambda one: one.record.feedback_id)


def _insert(
    connection: Connection, submission: Submission, arrival: Arrival, stands: dict[str, Any]
) -> SimpleNamespace:
    """Writes it down as it `stands`. Returns the row."""
    body = submission.feedback
    judgement = judgement_of(submission)
    user_rank, tenant_rank = tallies.count(connection, submission.tenant, body.user_id, arrival.micros)
    values: dict[str, Any] = {
        "feedback_id": arrival.feedback_id,
        "tenant": submission.tenant,
        "idempotency_key": body.idempotency_key,
        "body_sha256": submission.body_sha256,
        "user_id": body.user_id,
        "kind": submission.kind,
        "body": body.SerializeToString(deterministic=True),
        "prompt_id": submission.prompt_id,
        **stands,
        "comparison_id": None,
        "superseded_by": None,
        "received_at": arrival.micros,
        "propensity": picked.propensity_of(connection, submission),
        "user_rank": user_rank,
        "tenant_rank": tenant_rank,
        "released": False,
        "consent": submission.consent,
        "weight": 0.0,
        "revision": 1,
    }
    if judgement is not None:
        values |= judgement._asdict()
        values["sample_id"] = _sample_id(connection, submission, judgement, arrival)
    connection.execute(insert(feedback), values)
    connection.execute(
        insert(feedback_generations),
        [
            {"feedback_id": arrival.feedback_id, "place": place, "generation_id": claims.generation_id}
            for place, claims in enumerate(submission.claims)
        ],
    )
    return SimpleNamespace(**values)


def _sample_id(connection: Connection, submission: Submission, judgement: Judgement, arrival: Arrival) -> str:
    """What the judgement teaches: the same as an earlier one of this user to the same effect, so that who says a thing
    twice, or comes back to it, is learnt from once.
    """
    of = {"of_tenant": submission.tenant, "of_user": submission.feedback.user_id}
    of_what = {"of_item": judgement.item, "of_outcome": judgement.outcome}
    known = connection.execute(_FIRST_SAMPLE, {**of, **of_what}).scalar_one_or_none()
    return derived(arrival.feedback_id, "sample") if known is None else str(known)


def _group(connection: Connection, curator: Curator, submission: Submission) -> str:
    known = curator.groups.known(connection, submission.tenant, submission.prompt_id)
    if known is not None:
        return known
    generation_id = submission.claims[0].generation_id
    data = connection.execute(
        select(generations.c.event).where(generations.c.generation_id == generation_id)
    ).scalar_one()
    return curator.groups.group_of(connection, GenerationEvent.FromString(data))


def _generation(event: GenerationEvent, now: int) -> dict[str, Any]:
    generation = event.generation
    return {
        "generation_id": generation.generation_id,
        "tenant": event.tenant,
        "prompt_id": generation.prompt_id,
        "event": event.SerializeToString(),
        "stored_at": now,
        "prompt_sha256": ReceiptClaims.FromString(generation.receipt.claims).prompt_sha256 or None,
        "text_sha256": hashlib.sha256(generation.text.encode()).digest(),
        "user_id": event.user_id,
        "consent": not event.HasField("consent") or event.consent,
        "empty": not generation.text.strip(),
        "cut": generation.finish_reason == FinishReason.FINISH_REASON_LENGTH,
        "version": generation.spans[-1].version[:128] if generation.spans else "",
    }


def _arrived(connection: Connection, ids: Collection[str]) -> list[Arrived]:
    return [Arrived(*row) for row in connection.execute(_ARRIVED, {"of_ids": list(ids)})]


def _rows(connection: Connection, ids: Collection[str]) -> Sequence[Row[Any]]:
    if not ids:
        return []
    rows = select(feedback).where(feedback.c.feedback_id.in_(ids)).order_by(feedback.c.feedback_id)
    return connection.execute(rows).all()


def _set(connection: Connection, feedback_id: str, **values: Any) -> None:
    connection.execute(
        update(feedback).where(feedback.c.feedback_id == feedback_id).values(revision=feedback.c.revision + 1, **values)
    )


def _submission(row: Row[Any]) -> Submission:
    """The submission behind a record: its receipts were verified before it was recorded."""
    body = Feedback.FromString(row.body)
    claims = tuple(ReceiptClaims.FromString(receipt.claims) for _, receipt in receipts_of(body))
    return Submission(row.tenant, body, row.body_sha256, row.kind, claims, row.consent)
