"""Judgements as they stand in the database, in the form in which curation reads them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, select, text

from services.collector import many
from services.collector.curation import (
    Choice,
    CurationSettings,
    Overrides,
    Rater,
    RaterId,
    Raters,
    Reason,
    Response,
    Vote,
)
from services.collector.join import Arrived
from services.collector.tables import raters
from thumbwheel.v1.preference_pb2 import Feedback

_CHOICES = {choice.value: choice for choice in Choice}
_REASONS = {reason.value: reason for reason in Reason}
QUARANTINED, RELEASED = "QUARANTINED", "RELEASED"


class Standing(NamedTuple):
    """A judgement, and where it stood before it is curated again."""

    vote: Vote
    group: str
    kind: str
    item: bytes
    sample_id: str
    state: str
    reason: str
    weight: float
    comparison_id: str
    superseded_by: str
    released: bool


class Fresh(NamedTuple):
    """A judgement that is being recorded: its row, which is not in the database yet, and how it stands."""

    values: dict[str, Any]
    body: Feedback
    standing: Standing
    traceparent: str
    events: Mapping[str, bytes]
    """Of the generations that it is about, by id."""


class _Judged(NamedTuple):
    """A judgement with its responses, as one row: `b_` is of the second response, where there is one."""

    feedback_id: str
    tenant: str
    user_id: str
    kind: str
    prompt_id: str
    group_id: str
    item: bytes
    choice: str
    sample_id: str
    edit_sha256: Any
    user_rank: int
    tenant_rank: int
    received_at: int
    released: bool
    state: str
    reason: str
    weight: float
    comparison_id: str | None
    superseded_by: str | None
    prompt_sha256: bytes | None
    a_id: str
    a_sha256: bytes
    a_empty: bool
    a_cut: bool
    a_version: str
    b_id: str | None
    b_sha256: Any
    b_empty: Any
    b_cut: Any
    b_version: Any
    gold: str | None
    """The generation that is better beyond doubt, where this is a control question."""


_OF_FEEDBACK = _Judged._fields[: _Judged._fields.index("prompt_sha256")]
# One row for each, and as text: what SQLAlchemy adds to each value of a row takes longer than reading it.
_JUDGED = f"""
SELECT {", ".join(f"f.{name}" for name in _OF_FEEDBACK)}, a.prompt_sha256,
       a.generation_id, a.text_sha256, a.empty, a.cut, a.version,
       b.generation_id, b.text_sha256, b.empty, b.cut, b.version, gold.chosen
FROM feedback f
JOIN feedback_generations fa ON fa.feedback_id = f.feedback_id AND fa.place = 0
JOIN generations a ON a.generation_id = fa.generation_id
LEFT JOIN feedback_generations fb ON fb.feedback_id = f.feedback_id AND fb.place = 1
LEFT JOIN generations b ON b.generation_id = fb.generation_id
LEFT JOIN gold ON gold.tenant = f.tenant AND gold.item = f.item
WHERE f.joined = '' AND f.state <> 'RETRACTED' AND f.item IS NOT NULL
"""
_OF_GROUPS = f"{_JUDGED} AND f.tenant = :tenant AND f.group_id IN (:many) ORDER BY f.feedback_id"
_ALL = text(f"{_JUDGED} ORDER BY f.feedback_id")


def of_groups(connection: Connection, tenant: str, groups: Collection[str], *, learn_from_cut: bool) -> list[Standing]:
    """The judgements of these groups of prompts."""
    rows = many.find(connection, _OF_GROUPS, list(groups), tenant=tenant)
    return [_standing(_Judged(*row), learn_from_cut) for row in rows]


_GOLD = "SELECT item, chosen FROM gold WHERE tenant = :tenant AND item IN (:many)"


def gold_of(connection: Connection, tenant: str, items: Sequence[bytes]) -> dict[bytes, str]:
    """Of those items that are control questions, the generation that is better."""
    return {bytes(item): chosen for item, chosen in many.find(connection, _GOLD, items, tenant=tenant)}


def fresh(values: dict[str, Any], seen: Sequence[Arrived], chosen: str | None, learn_from_cut: bool) -> Standing:
    """How a judgement stands that is being recorded, of generations in the order of display."""
    shown = [(one.generation_id, one.text_sha256, one.empty, one.cut, one.version) for one in seen]
    first, second = shown[0], shown[1] if len(shown) > 1 else (None,) * 5
    own = (values[name] for name in _OF_FEEDBACK)
    row = _Judged._make([*own, seen[0].prompt_sha256, *first, *second, chosen])
    return _standing(row, learn_from_cut)


def everything(connection: Connection, *, learn_from_cut: bool) -> Iterator[tuple[str, Vote]]:
    """All judgements of all tenants with their groups, read a page at a time."""
    for row in connection.execution_options(yield_per=1_000).execute(_ALL):
        standing = _standing(_Judged(*row), learn_from_cut)
        yield standing.group, standing.vote


_RATERS = "SELECT * FROM raters WHERE tenant = :tenant AND user_id IN (:many)"


def raters_of(connection: Connection, who: Iterable[RaterId], settings: CurationSettings) -> tuple[Raters, Overrides]:
    """What is known of these raters, and what operators said of them."""
    by_tenant: dict[str, set[str]] = {}
    for rater in who:
        by_tenant.setdefault(rater.tenant, set()).add(rater.user_id)
    known: dict[RaterId, Rater] = {}
    by_hand: dict[str, set[RaterId]] = {QUARANTINED: set(), RELEASED: set()}
    for tenant, users in by_tenant.items():
        for row in many.find(connection, _RATERS, list(users), tenant=tenant):
            known[RaterId(tenant, row.user_id)] = _rater(row)
            if row.by_hand:
                by_hand[row.by_hand].add(RaterId(tenant, row.user_id))
    overrides = Overrides(quarantined=frozenset(by_hand[QUARANTINED]), released=frozenset(by_hand[RELEASED]))
    return Raters(Raters.none(settings).newcomer, known), overrides


def all_raters(connection: Connection) -> tuple[dict[RaterId, Rater], Overrides]:
    """What is known of everybody, and what operators said."""
    known: dict[RaterId, Rater] = {}
    by_hand: dict[str, set[RaterId]] = {QUARANTINED: set(), RELEASED: set(), "": set()}
    for row in connection.execute(select(raters)):
        who = RaterId(row.tenant, row.user_id)
        known[who] = _rater(row)
        by_hand[row.by_hand].add(who)
    return known, Overrides(quarantined=frozenset(by_hand[QUARANTINED]), released=frozenset(by_hand[RELEASED]))


def _rater(row: Row[Any]) -> Rater:
    return Rater(
        reliability=row.reliability,
        weight=row.weight,
        votes=row.votes,
        judged=row.judged,
        gold_judged=row.gold_judged,
        gold_correct=row.gold_correct,
        quarantine=_REASONS[row.quarantine] if row.quarantine else None,
        bursts=tuple((start, end) for start, end in json.loads(row.bursts)),
    )


def _standing(row: _Judged, learn_from_cut: bool) -> Standing:
    a = Response(row.a_id, row.a_sha256, bool(row.a_empty), bool(row.a_cut and not learn_from_cut), row.a_version)
    b = None
    if row.b_id is not None:
        cut = bool(row.b_cut and not learn_from_cut)
        b = Response(row.b_id, row.b_sha256, bool(row.b_empty), cut, row.b_version)
    edit = row.kind == "edit"
    if edit:  # the user's own text stands for the better response
        a, b = Response(row.feedback_id, row.edit_sha256), a
    vote = Vote(
        row.feedback_id,
        RaterId(row.tenant, row.user_id),
        row.prompt_id,
        _CHOICES[row.choice],
        a,
        row.received_at,
        b,
        row.prompt_sha256 or b"",
        edit,
        None if row.gold is None else Choice.A if row.gold == a.generation_id else Choice.B,
        row.user_rank,
        row.tenant_rank,
    )
    return Standing(
        vote,
        row.group_id,
        row.kind,
        row.item,
        row.sample_id,
        row.state,
        row.reason,
        row.weight,
        row.comparison_id or "",
        row.superseded_by or "",
        bool(row.released),
    )
