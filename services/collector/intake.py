"""Feedback becomes part of the record, many pieces at once: one statement for all where there was one for each.

    acknowledged ──▶ recorded already, forgotten since? ──┐
    imported ──▶ known keys, may they come in? ───────────┴──▶ generations there? ──▶ ranks, samples ──▶ decide ──▶
                                                                   │ no                           rows · outbox
                                                                   ▼
                                                               HELD, until `ledger.store` brings them

Whatever is refused has written nothing, so that the others of its commit stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Connection, bindparam, insert, select

from services.collector import guide, inbox, many, outbox, picked, records, standing, tallies
from services.collector.decide import decided
from services.collector.groups import Groups
from services.collector.identity import Arrival, derived
from services.collector.inbox import Waiting
from services.collector.join import AWAITING, Arrived, join
from services.collector.judgement import Judgement, judgement_of
from services.collector.records import Recorded
from services.collector.rights import tombstones
from services.collector.rules import Rules
from services.collector.standing import Fresh
from services.collector.submission import Submission
from services.collector.tables import feedback, feedback_generations
from thumbwheel import errors

Result: TypeAlias = Recorded | errors.ThumbwheelError

# Built once: building a statement takes longer than running it.
_KNOWN = "SELECT feedback_id FROM feedback WHERE tenant = :tenant AND idempotency_key IN (:many)"
_FEEDBACK = select(feedback).where(feedback.c.feedback_id.in_(bindparam("of_ids", expanding=True)))
_SAMPLES = """
SELECT user_id, outcome, sample_id FROM feedback
WHERE tenant = :tenant AND (user_id, item) IN (VALUES :many) ORDER BY feedback_id
"""
_ARRIVED = f"SELECT {', '.join(Arrived._fields)} FROM generations WHERE generation_id IN (:many)"


@dataclass(frozen=True, slots=True)
class Curator:
    """By what feedback is judged, and which prompts are alike. For one thread: that of the database's writer."""

    rules: Rules = field(default_factory=Rules)
    groups: Groups = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", Groups(self.rules.curation))


class Incoming(NamedTuple):
    """A submission that is to be recorded. `arrival` is given where a record is replayed."""

    submission: Submission
    traceparent: str = ""
    arrival: Arrival | None = None


class _Piece:
    """One submission on its way in."""

    __slots__ = ("arrival", "judgement", "propensity", "result", "submission", "traceparent")

    def __init__(self, incoming: Incoming) -> None:
        self.submission, self.traceparent, arrival = incoming
        self.arrival = arrival or Arrival.now()
        self.judgement: Judgement | None = judgement_of(self.submission)
        self.propensity: float | None = None
        self.result: Result | None = None

    @property
    def marks(self) -> list[tuple[Any, ...]]:
        """What no two pieces of a tenant may have in common that are recorded together: a key, or a user's item."""
        body = self.submission.feedback
        marks: list[tuple[Any, ...]] = [("key", body.idempotency_key)]
        if self.judgement is not None:
            marks.append(("item", body.user_id, self.judgement.item))
        return marks


def take(connection: Connection, rows: Sequence[Waiting], curator: Curator) -> list[Recorded]:
    """Records what was acknowledged, in its order, each piece once: what is recorded already is passed over, as is what
    a user said who was forgotten since. Returns what was recorded.
    """
    pieces = []
    for row in rows:
        arrival = Arrival(row.feedback_id, row.received_at)
        piece = _Piece(Incoming(inbox.submission_of(row), row.traceparent, arrival))
        piece.propensity = row.propensity
        pieces.append(piece)
    _in_turn(pieces, partial(_take, connection, curator))
    return [piece.result for piece in pieces if isinstance(piece.result, Recorded) and piece.result.changed]


def _take(connection: Connection, curator: Curator, tenant: str, pieces: Sequence[_Piece]) -> None:
    _repeated(connection, tenant, pieces)
    _refuse(tombstones.refused, connection, tenant, pieces)
    _record(connection, curator, tenant, _open(pieces))


def submit(connection: Connection, incoming: Sequence[Incoming], curator: Curator) -> list[Result]:
    """Checks and records submissions at once, in their order, as imports do; joins those whose generations have
    arrived, and holds the others.

    The same submission again changes nothing. What is refused comes back as the error, in its place: `errors.Conflict`
    where the key was used with another body, `errors.InvalidArgument` for guidelines, aspects or a propensity that this
    tenant does not have, `errors.FailedPrecondition` where the user, or what it is about, was forgotten.
    """
    pieces = [_Piece(one) for one in incoming]
    _in_turn(pieces, partial(_submit, connection, curator))
    results = [piece.result for piece in pieces]
    assert None not in results, "each piece has a result"
    return results  # type: ignore[return-value]  # as was just asserted


def _in_turn(pieces: Sequence[_Piece], work: Callable[[str, Sequence[_Piece]], None]) -> None:
    """Calls `work` with the pieces of each tenant, in their order, as many at once as do not depend on each other."""
    by_tenant: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        by_tenant[piece.submission.tenant].append(piece)
    for tenant, of_tenant in by_tenant.items():
        together: list[_Piece] = []
        seen: set[tuple[Any, ...]] = set()
        for piece in of_tenant:
            if not seen.isdisjoint(piece.marks):  # it is to see the other one written down
                work(tenant, together)
                together, seen = [], set()
            together.append(piece)
            seen.update(piece.marks)
        work(tenant, together)


def _submit(connection: Connection, curator: Curator, tenant: str, pieces: Sequence[_Piece]) -> None:
    """Records pieces of one tenant, no two of one key or of one user's item."""
    _repeated(connection, tenant, pieces)
    for refuse in (tombstones.refused, guide.refused):
        _refuse(refuse, connection, tenant, pieces)
    open_ = _open(pieces)
    for piece, found in zip(open_, picked.propensities(connection, tenant, _of(open_)), strict=True):
        if isinstance(found, errors.ThumbwheelError):
            piece.result = found
        else:
            piece.propensity = found
    _record(connection, curator, tenant, _open(pieces))


def _refuse(
    refuse: Callable[[Connection, str, Sequence[Submission]], Sequence[Result | None]],
    connection: Connection,
    tenant: str,
    pieces: Sequence[_Piece],
) -> None:
    open_ = _open(pieces)
    for piece, error in zip(open_, refuse(connection, tenant, _of(open_)), strict=True):
        piece.result = error


def _repeated(connection: Connection, tenant: str, pieces: Sequence[_Piece]) -> None:
    """Settles those whose key was used before."""
    keys = [piece.submission.feedback.idempotency_key for piece in pieces]
    known = many.find(connection, _KNOWN, keys, tenant=tenant)
    if not known:
        return
    before = {row.idempotency_key: row for row in connection.execute(_FEEDBACK, {"of_ids": [id for (id,) in known]})}
    for key, piece in zip(keys, pieces, strict=True):
        row = before.get(key)
        if row is None:
            continue
        if row.body_sha256 == piece.submission.body_sha256:
            piece.result = records.recorded(row, changed=False)
        else:
            piece.result = errors.Conflict(
                f"feedback.idempotency_key: {key!r} was used before with other content.",
                remedy="Use a new key for new feedback, and send a repeated one unchanged.",
            )


def _record(connection: Connection, curator: Curator, tenant: str, pieces: Sequence[_Piece]) -> None:
    """Writes new pieces down, and publishes what becomes of them."""
    if not pieces:
        return
    submissions = _of(pieces)
    known = arrived(connection, {claims.generation_id for one in submissions for claims in one.claims})
    joined = [join(one, known) for one in submissions]
    teaching = [one for one, how in zip(submissions, joined, strict=True) if how is not None and how.teaches]
    groups = groups_of(connection, curator, tenant, teaching, known)
    came = [(one.feedback.user_id, piece.arrival.micros) for one, piece in zip(submissions, pieces, strict=True)]
    ranks = tallies.count(connection, tenant, came)
    samples = _samples(connection, tenant, pieces)
    gold = standing.gold_of(connection, tenant, [piece.judgement.item for piece in pieces if piece.judgement])
    fresh: list[Fresh] = []
    aside: list[tuple[_Piece, dict[str, Any]]] = []
    for piece, how, rank, sample_id in zip(pieces, joined, ranks, samples, strict=True):
        values = _values(piece, rank, sample_id)
        if how is not None and how.teaches:
            values |= {"joined": "", "group_id": groups[piece.submission.prompt_id]}
            seen = [known[claims.generation_id] for claims in piece.submission.claims]
            judged = standing.fresh(values, seen, gold.get(values["item"]), curator.rules.learn_from_cut)
            events = {one.generation_id: one.event for one in seen}
            fresh.append(Fresh(values, piece.submission.feedback, judged, piece.traceparent, events))
        else:
            if how is not None:
                values |= {"state": records.name_of(how.state), "reason": how.reason, "joined": how.reason}
            aside.append((piece, values))
    told, publish = _put_aside(connection, aside)
    others: list[outbox.Event] = []
    if fresh:
        found = sorted({one.values["group_id"] for one in fresh})
        made = decided(connection, curator.rules, tenant, found, fresh=fresh)
        told |= {one.record.feedback_id: one for one in made.told}
        publish |= made.feedback
        others = [*made.samples]
    # What is recorded here is told of in its order, whatever came of it; then what else came of that.
    ids = [piece.arrival.feedback_id for piece in pieces]
    first = [publish.pop(id) for id in ids]
    outbox.add(connection, [*first, *publish.values(), *others])
    connection.execute(
        insert(feedback_generations),
        [
            {"feedback_id": piece.arrival.feedback_id, "place": place, "generation_id": claims.generation_id}
            for piece in pieces
            for place, claims in enumerate(piece.submission.claims)
        ],
    )
    for piece in pieces:
        piece.result = told[piece.arrival.feedback_id]


def _put_aside(
    connection: Connection, aside: Iterable[tuple[_Piece, dict[str, Any]]]
) -> tuple[dict[str, Recorded], dict[str, outbox.Event]]:
    """Writes down what is not curated, at least not now; returns it, and what is told of it, by id."""
    told: dict[str, Recorded] = {}
    rows, events = [], {}
    for piece, values in aside:
        one = records.new(values, piece.submission.feedback)
        told[one.record.feedback_id] = one
        rows.append(values)
        events[one.record.feedback_id] = records.event_of(one, piece.submission.prompt_id, piece.traceparent)
    if rows:
        connection.execute(insert(feedback), rows)
    return told, events


def _values(piece: _Piece, ranks: tuple[int, int], sample_id: str | None) -> dict[str, Any]:
    """The row of a piece that waits for its generations."""
    submission, judgement = piece.submission, piece.judgement
    item, choice, outcome, edit_sha256 = judgement or (None, None, None, None)
    return {
        "feedback_id": piece.arrival.feedback_id,
        "tenant": submission.tenant,
        "idempotency_key": submission.feedback.idempotency_key,
        "body_sha256": submission.body_sha256,
        "user_id": submission.feedback.user_id,
        "kind": submission.kind,
        "body": submission.body,
        "prompt_id": submission.prompt_id,
        "state": "HELD",
        "reason": AWAITING,
        "comparison_id": None,
        "received_at": piece.arrival.micros,
        "item": item,
        "choice": choice,
        "outcome": outcome,
        "sample_id": sample_id,
        "edit_sha256": edit_sha256,
        "propensity": piece.propensity,
        "user_rank": ranks[0],
        "tenant_rank": ranks[1],
        "joined": None,
        "group_id": None,
        "released": False,
        "superseded_by": None,
        "weight": 0.0,
        "revision": 1,
        "consent": submission.consent,
    }


def _samples(connection: Connection, tenant: str, pieces: Sequence[_Piece]) -> list[str | None]:
    """What each judgement teaches: the same as an earlier one of this user to the same effect, so that who says a thing
    twice, or comes back to it, is learnt from once.
    """
    judged = [
        (piece.submission.feedback.user_id, piece.judgement.item) for piece in pieces if piece.judgement is not None
    ]
    known: dict[tuple[str, bytes], str] = {}
    if judged:
        for user_id, outcome, sample_id in many.find(connection, _SAMPLES, judged, tenant=tenant):
            known.setdefault((user_id, bytes(outcome)), sample_id)
    return [
        None
        if piece.judgement is None
        else known.get((piece.submission.feedback.user_id, piece.judgement.outcome))
        or derived(piece.arrival.feedback_id, "sample")
        for piece in pieces
    ]


def groups_of(
    connection: Connection,
    curator: Curator,
    tenant: str,
    submissions: Sequence[Submission],
    known: Mapping[str, Arrived],
) -> dict[str, str]:
    """The groups of the submissions' prompts, by prompt id. `known` has their generations."""
    answered = {one.prompt_id: known[one.claims[0].generation_id].event for one in submissions}
    return curator.groups.of(connection, tenant, answered)


def arrived(connection: Connection, ids: Collection[str]) -> Mapping[str, Arrived]:
    """What is known of these generations, by id."""
    return {row[0]: Arrived(*row) for row in many.find(connection, _ARRIVED, list(ids))}


def _open(pieces: Sequence[_Piece]) -> list[_Piece]:
    return [piece for piece in pieces if piece.result is None]


def _of(pieces: Sequence[_Piece]) -> list[Submission]:
    return [piece.submission for piece in pieces]
