"""Erasing content, in one transaction: rows, what the outbox holds of them, and everything derived.

    a user, or what is too old ──▶ feedback · generations ──▶ events in the outbox that speak of them
                                         │                           │
                                 rows are deleted,            events are deleted; retractions, which hold
                                 tombstones are set           no content, are published in their place

What is left on the disk, the freed pages and the exported files, is `eraser.py`'s; the row in `erasures` says that it
is still to be done, so that a process that dies in between goes on there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from sqlalchemy import ColumnElement, Connection, Select, delete, insert, select, update
from uuid_utils import uuid7

from services.collector import outbox
from services.collector.decide import decide
from services.collector.emit import COMPARISON, THUMB, SampleEvent, retracted
from services.collector.many import PAGE
from services.collector.outbox import now_micros
from services.collector.rights import tombstones
from services.collector.rules import Rules
from services.collector.tables import (
    decision_votes,
    decisions,
    erased_samples,
    erasures,
    feedback,
    feedback_generations,
    generations,
    prompts,
    raters,
    shown,
    tallies,
)
from services.collector.tables import outbox as events
from thumbwheel.forgotten import prompt_hash, user_hash
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import ComparisonEvent, DeadLetter, FeedbackEvent, GenerationEvent, ThumbEvent
from thumbwheel.v1.preference_pb2 import FeedbackRecord, FeedbackState

T = TypeVar("T")

FORGOTTEN = "forgotten"
EXPIRED = "expired"


@dataclass
class Content:
    """What is to be erased, by id, each with its prompt's id."""

    feedback: dict[str, str] = field(default_factory=dict)
    generations: dict[str, str] = field(default_factory=dict)

    @property
    def prompts(self) -> set[str]:
        """The prompts that it is about."""
        return {*self.feedback.values(), *self.generations.values()}

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.feedback or self.generations)


def forget(connection: Connection, rules: Rules, tenant: str, user_id: str, *, elsewhere: bool = False) -> str:
    """Erases all of a user: feedback, the generations they asked for, and what anyone said of those.

    Generations that name no user count as theirs where they alone judged them. Returns the erasure's id. Again, it
    erases what has come since, which is nothing. `elsewhere`: policy servers may have generations that never came here.
    """
    erasure_id = str(uuid7())
    theirs = Content()
    _add(theirs.feedback, connection, _feedback(feedback.c.tenant == tenant, feedback.c.user_id == user_id))
    judged = sorted(theirs.prompts - _judged_by_others(connection, tenant, user_id, theirs.prompts))
    mine = [generations.c.tenant == tenant, generations.c.user_id == user_id]
    _add(theirs.generations, connection, _generations(*mine))
    for some in pages(judged):
        nobodys = [generations.c.tenant == tenant, generations.c.user_id == "", generations.c.prompt_id.in_(some)]
        _add(theirs.generations, connection, _generations(*nobodys))
    # Those whose responses have not arrived: they may come without a user's name.
    awaited = [prompt for prompt in judged if prompt not in _with_generations(connection, tenant, judged)]
    gone = {*awaited, *theirs.generations.values()}
    subject = user_hash(tenant, user_id)
    again = connection.execute(select(erasures.c.erasure_id).where(erasures.c.subject == subject).limit(1)).first()
    _begin(connection, erasure_id, tenant, subject)
    letters = _erase_dead_letters(connection, tenant, user_id)
    hashes = [user_hash(tenant, user_id), *(prompt_hash(tenant, prompt) for prompt in sorted(gone))]
    tombstones.bury(connection, hashes, erasure_id)
    for table in (raters, shown, tallies):
        connection.execute(delete(table).where(table.c.tenant == tenant, table.c.user_id == user_id))
    _erase(connection, rules, erasure_id, tenant, theirs, FORGOTTEN)
    if not theirs and not letters and (again or not elsewhere):
        connection.execute(update(erasures).where(erasures.c.erasure_id == erasure_id).values(finished_at=now_micros()))
    return erasure_id


def expire(connection: Connection, rules: Rules, tenant: str, before: int, limit: int) -> str | None:
    """Erases content of a tenant from before a time (microseconds since the epoch), at most `limit` generations and as
    much feedback. Returns the erasure's id; None where there was nothing.
    """
    old = Content()
    aged = select(feedback.c.feedback_id, feedback.c.prompt_id).where(
        feedback.c.tenant == tenant, feedback.c.received_at < before
    )
    _add(old.feedback, connection, aged.limit(limit))
    stale = select(generations.c.generation_id, generations.c.prompt_id).where(
        generations.c.tenant == tenant, generations.c.stored_at < before
    )
    _add(old.generations, connection, stale.limit(limit))
    if not old:
        return None
    erasure_id = str(uuid7())
    _begin(connection, erasure_id, tenant, None)
    _erase(connection, rules, erasure_id, tenant, old, EXPIRED)
    return erasure_id


def expire_dead_letters(connection: Connection, before: int) -> int:
    """Erases dead letters from before a time, whoever's they were. Returns how many."""
    old = delete(events).where(events.c.topic == topics.DEADLETTER, events.c.created_at < before)
    return connection.execute(old).rowcount


def pages(values: Iterable[T]) -> Iterator[list[T]]:
    """The values, as many at a time as go into one statement."""
    page: list[T] = []
    for value in values:
        page.append(value)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


def _begin(connection: Connection, erasure_id: str, tenant: str, subject: bytes | None) -> None:
    row = {
        "erasure_id": erasure_id,
        "tenant": tenant,
        "subject": subject,
        "feedback_erased": 0,
        "generations_erased": 0,
        "exported_rows_erased": 0,
        "exports_out_of_reach": "",
        "requested_at": now_micros(),
    }
    connection.execute(insert(erasures), row)


def _erase(connection: Connection, rules: Rules, erasure_id: str, tenant: str, content: Content, reason: str) -> None:
    for ids in pages(list(content.generations)):
        about = select(feedback_generations.c.feedback_id).where(feedback_generations.c.generation_id.in_(ids))
        _add(content.feedback, connection, _feedback(feedback.c.feedback_id.in_(about)))
    groups = _groups(connection, content)
    live = _erase_events(connection, content, _prompts_of(connection, tenant, groups) | content.prompts)
    _note_samples(connection, erasure_id, {*live, *content.feedback})
    for page in pages(sorted(content.feedback)):
        rests = select(decision_votes.c.sample_id).where(decision_votes.c.feedback_id.in_(page))
        samples = connection.execute(rests).scalars().all()
        for some in pages(samples):
            connection.execute(delete(decision_votes).where(decision_votes.c.sample_id.in_(some)))
            connection.execute(delete(decisions).where(decisions.c.sample_id.in_(some)))
    for column, gone in (
        (feedback_generations.c.feedback_id, content.feedback),
        (feedback.c.feedback_id, content.feedback),
        (generations.c.generation_id, content.generations),
    ):
        for page in pages(sorted(gone)):
            connection.execute(delete(column.table).where(column.in_(page)))
    connection.execute(
        update(erasures)
        .where(erasures.c.erasure_id == erasure_id)
        .values(feedback_erased=len(content.feedback), generations_erased=len(content.generations))
    )
    outbox.add(connection, _told(tenant, content, live, reason))
    # What others said is judged again without it: who was outvoted may be right now.
    for page in pages(sorted(groups)):
        decide(connection, rules, tenant, page)


def _groups(connection: Connection, content: Content) -> set[str]:
    """The groups of prompts that are curated together with what is to be erased."""
    groups: set[str] = set()
    for page in pages(sorted(content.feedback)):
        found = select(feedback.c.group_id).where(feedback.c.feedback_id.in_(page), feedback.c.group_id.is_not(None))
        groups.update(connection.execute(found).scalars())
    return groups


def _prompts_of(connection: Connection, tenant: str, groups: set[str]) -> set[str]:
    """Every prompt of these groups: events of one may speak of another's responses."""
    found: set[str] = set()
    for page in pages(sorted(groups)):
        there = select(prompts.c.prompt_id).where(prompts.c.tenant == tenant, prompts.c.group_id.in_(page))
        found.update(connection.execute(there).scalars())
    return found


def _note_samples(connection: Connection, erasure_id: str, samples: set[str]) -> None:
    known: set[str] = set()
    for page in pages(sorted(samples)):
        there = select(erased_samples.c.sample_id).where(erased_samples.c.sample_id.in_(page))
        known.update(connection.execute(there).scalars())
    rows = [{"sample_id": id, "erasure_id": erasure_id} for id in sorted(samples - known)]
    for some in pages(rows):
        connection.execute(insert(erased_samples), some)


def _told(tenant: str, content: Content, live: dict[str, SampleEvent], reason: str) -> Iterator[outbox.Event]:
    """What is published in place of what was erased: retractions for the trainer, and ids for those who watch."""
    # Also for what was retracted before: that event went too, and a broker that loses everything must have one again.
    for id, event in live.items():
        kind, topic = (THUMB, topics.THUMBS) if isinstance(event, ThumbEvent) else (COMPARISON, topics.COMPARISONS)
        revision = event.revision + 1
        taken_back = retracted(id, kind, revision, tenant, event.prompt_id, event.feedback_ids, reason)
        yield outbox.Event(taken_back.event_id, topic, event.prompt_id, taken_back)
    for id, prompt_id in content.feedback.items():
        state = FeedbackState.FEEDBACK_STATE_RETRACTED
        record = FeedbackRecord(feedback_id=id, tenant=tenant, state=state, reason=reason)
        told = FeedbackEvent(event_id=str(uuid7()), record=record)
        yield outbox.Event(told.event_id, topics.FEEDBACK, prompt_id, told)


def _erase_events(connection: Connection, content: Content, about: set[str]) -> dict[str, SampleEvent]:
    """Deletes the events about these prompts that speak of the content. Returns the last one of each sample."""
    live: dict[str, SampleEvent] = {}
    row = events.c
    for some in pages(sorted(about)):
        keys = [prompt.encode() for prompt in some]
        found = connection.execute(select(row.id, row.schema, row.value).where(row.key.in_(keys)).order_by(row.id))
        doomed = [id for id, schema, value in found if _speaks_of(content, schema, value, live)]
        for ids in pages(doomed):
            connection.execute(delete(events).where(row.id.in_(ids)))
    return live


def _speaks_of(content: Content, schema: str, value: bytes, live: dict[str, SampleEvent]) -> bool:
    if schema == FeedbackEvent.DESCRIPTOR.full_name:
        return FeedbackEvent.FromString(value).record.feedback_id in content.feedback
    event: SampleEvent
    if schema == ComparisonEvent.DESCRIPTOR.full_name:
        event = ComparisonEvent.FromString(value)
        id, responses = event.comparison_id, {event.chosen.generation_id, event.rejected.generation_id}
    elif schema == ThumbEvent.DESCRIPTOR.full_name:
        event = ThumbEvent.FromString(value)
        id, responses = event.thumb_id, {event.response.generation_id}
    else:
        return False
    if responses & content.generations.keys() or content.feedback.keys() & set(event.feedback_ids):
        live[id] = event
        return True
    return False


def _erase_dead_letters(connection: Connection, tenant: str, user_id: str) -> int:
    """Dead letters hold records as they came, some of which may be the user's. Returns how many."""
    row = events.c
    letters = connection.execute(select(row.id, row.value).where(row.topic == topics.DEADLETTER))
    doomed = [id for id, value in letters if _may_be_of(DeadLetter.FromString(value), tenant, user_id)]
    for ids in pages(doomed):
        connection.execute(delete(events).where(row.id.in_(ids)))
    return len(doomed)


def _may_be_of(letter: DeadLetter, tenant: str, user_id: str) -> bool:
    """Whether a record that could not be used may be the user's: what cannot be read is searched for the name."""
    try:
        event = GenerationEvent.FromString(letter.value)
    except DecodeError:
        return user_id.encode() in letter.value
    return event.user_id == user_id and event.tenant in (tenant, "")


def _judged_by_others(connection: Connection, tenant: str, user_id: str, prompt_ids: set[str]) -> set[str]:
    found: set[str] = set()
    for page in pages(sorted(prompt_ids)):
        others = select(feedback.c.prompt_id).where(
            feedback.c.tenant == tenant, feedback.c.prompt_id.in_(page), feedback.c.user_id != user_id
        )
        found.update(connection.execute(others).scalars())
    return found


def _with_generations(connection: Connection, tenant: str, prompt_ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for page in pages(prompt_ids):
        there = select(generations.c.prompt_id).where(generations.c.tenant == tenant, generations.c.prompt_id.in_(page))
        found.update(connection.execute(there).scalars())
    return found


def _feedback(*conditions: ColumnElement[bool]) -> Select[Any]:
    return select(feedback.c.feedback_id, feedback.c.prompt_id).where(*conditions)


def _generations(*conditions: ColumnElement[bool]) -> Select[Any]:
    return select(generations.c.generation_id, generations.c.prompt_id).where(*conditions)


def _add(content: dict[str, str], connection: Connection, rows: Select[Any]) -> None:
    content.update((id, prompt) for id, prompt in connection.execute(rows))
