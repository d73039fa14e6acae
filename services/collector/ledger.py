"""The record of feedback after it is in: taken back, read, and joined to generations that arrive after it.

    store ──▶ which feedback waited for these? ──▶ join ──▶ the prompt's group ──▶ decide ──▶ outbox

What comes in is recorded by `intake`. Every change of state is told on the `feedback` topic, with the record as it then
is and an event id of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from services.collector import inbox, intake, outbox, records
from services.collector.decide import decide
from services.collector.intake import Curator
from services.collector.join import Arrived, Joined, join
from services.collector.records import Recorded
from services.collector.submission import Submission
from services.collector.tables import feedback, feedback_generations, generations, held
from services.collector.tables import inbox as waiting
from services.collector.tables import outbox as outbox_table
from thumbwheel import errors
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import FinishReason, ReceiptClaims
from thumbwheel.v1.preference_pb2 import FeedbackRecord

RETRACTED, RETRACTED_BY_USER, WITHDRAWN = "RETRACTED", "retracted_by_user", "withdrawn"


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
    """Those records of the tenant that exist, in the order asked for; what is yet to be recorded is held."""
    by_id: dict[str, FeedbackRecord] = {}
    # In this order: what is recorded meanwhile is in both.
    for table, record_of in ((waiting, inbox.record_of), (feedback, records.record_of)):
        found = select(table).where(table.c.tenant == tenant, table.c.feedback_id.in_(feedback_ids))
        by_id |= {row.feedback_id: record_of(row) for row in connection.execute(found)}
    return [by_id[id] for id in feedback_ids if id in by_id]


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
    unjoined = select(feedback).where(held, feedback.c.feedback_id.in_(refers)).order_by(feedback.c.feedback_id)
    submissions = [(row.feedback_id, inbox.submission_of(row)) for row in connection.execute(unjoined).all()]
    wanted = {claims.generation_id for _, submission in submissions for claims in submission.claims}
    known = intake.arrived(connection, wanted)
    ready = [(id, submission, join(submission, known)) for id, submission in submissions]
    return _settle(connection, curator, [(id, one, joined) for id, one, joined in ready if joined is not None], known)


def _traceparents(connection: Connection, ready: Sequence[tuple[str, Submission, Joined]]) -> dict[str, str]:
    """The traces of the calls that submitted this feedback, by its id: they are kept with what was told of it then."""
    first = {records.told_id(id, 1): id for id, _, _ in ready}
    keys = {submission.prompt_id.encode() for _, submission, _ in ready}
    told = select(outbox_table.c.event_id, outbox_table.c.traceparent).where(
        outbox_table.c.key.in_(keys), outbox_table.c.traceparent != ""
    )
    return {first[event_id]: carried for event_id, carried in connection.execute(told) if event_id in first}


def _settle(
    connection: Connection,
    curator: Curator,
    ready: Sequence[tuple[str, Submission, Joined]],
    known: Mapping[str, Arrived],
) -> list[Recorded]:
    """Feedback whose generations are there: what may teach is curated, the rest told of as it is."""
    teaching: dict[tuple[str, str], list[str]] = {}
    aside: list[str] = []
    prompts: dict[str, list[Submission]] = {}
    for _, submission, joined in ready:
        if joined.teaches:
            prompts.setdefault(submission.tenant, []).append(submission)
    groups = {
        tenant: intake.groups_of(connection, curator, tenant, of_one, known) for tenant, of_one in prompts.items()
    }
    for id, submission, joined in ready:
        if joined.teaches:
            group = groups[submission.tenant][submission.prompt_id]
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


def _rows(connection: Connection, ids: Collection[str]) -> Sequence[Row[Any]]:
    if not ids:
        return []
    rows = select(feedback).where(feedback.c.feedback_id.in_(ids)).order_by(feedback.c.feedback_id)
    return connection.execute(rows).all()


def _set(connection: Connection, feedback_id: str, **values: Any) -> None:
    connection.execute(
        update(feedback).where(feedback.c.feedback_id == feedback_id).values(revision=feedback.c.revision + 1, **values)
    )
