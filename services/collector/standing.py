"""Judgements as they stand in the database, in the form in which curation reads them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, select

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
from services.collector.tables import feedback, feedback_generations, generations, gold, raters
from thumbwheel.v1.preference_pb2 import Feedback

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


_FIELDS = ("feedback_id", "tenant", "user_id", "kind", "prompt_id", "group_id", "item", "choice", "sample_id")
_OTHERS = ("edit_sha256", "user_rank", "tenant_rank", "received_at", "released")
_STOOD = ("state", "reason", "weight", "comparison_id", "superseded_by")


def _all() -> Select[Any]:
    """Judgements that may teach, each with a row for each of its responses."""
    return (
        select(
            *(feedback.c[name] for name in (*_FIELDS, *_OTHERS, *_STOOD)),
            generations.c.generation_id,
            generations.c.prompt_sha256,
            generations.c.text_sha256,
            generations.c.empty,
            generations.c.cut,
            generations.c.version,
            gold.c.chosen,
        )
        .join_from(feedback, feedback_generations, feedback_generations.c.feedback_id == feedback.c.feedback_id)
        .join(generations, generations.c.generation_id == feedback_generations.c.generation_id)
        .outerjoin(gold, (gold.c.tenant == feedback.c.tenant) & (gold.c.item == feedback.c.item))
        .where(feedback.c.joined == "", feedback.c.state != "RETRACTED", feedback.c.item.is_not(None))
        .order_by(feedback.c.feedback_id, feedback_generations.c.place)
    )


_OF_GROUPS = _all().where(
    feedback.c.tenant == bindparam("of_tenant"), feedback.c.group_id.in_(bindparam("of_groups", expanding=True))
)


def of_groups(connection: Connection, tenant: str, groups: Collection[str], *, learn_from_cut: bool) -> list[Standing]:
    """The judgements of these groups of prompts, by feedback id."""
    rows = connection.execute(_OF_GROUPS, {"of_tenant": tenant, "of_groups": list(groups)}).all()
    return list(_standings(rows, learn_from_cut))


_GOLD = "SELECT item, chosen FROM gold WHERE tenant = :tenant AND item IN (:many)"


def gold_of(connection: Connection, tenant: str, items: Sequence[bytes]) -> dict[bytes, str]:
    """Of those items that are control questions, the generation that is better."""
    return {bytes(item): chosen for item, chosen in many.find(connection, _GOLD, items, tenant=tenant)}


def fresh(values: dict[str, Any], seen: Sequence[Arrived], chosen: str | None, learn_from_cut: bool) -> Standing:
    """How a judgement stands that is being recorded, of generations in the order of display."""
    responses = [
        Response(one.generation_id, one.text_sha256, one.empty, one.cut and not learn_from_cut, one.version)
        for one in seen
    ]
    return _standing(SimpleNamespace(**values, prompt_sha256=seen[0].prompt_sha256, chosen=chosen), responses)


def everything(connection: Connection, *, learn_from_cut: bool) -> Iterator[tuple[str, Vote]]:
    """All judgements of all tenants with their groups, read a page at a time."""
    rows = connection.execution_options(yield_per=1_000).execute(_all())
    return ((standing.group, standing.vote) for standing in _standings(rows, learn_from_cut))


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


def _standings(rows: Iterable[Row[Any]], learn_from_cut: bool) -> Iterator[Standing]:
    for _, of_one in groupby(rows, key=itemgetter(0)):
        both = list(of_one)
        yield _standing(both[0], [_response(one, learn_from_cut) for one in both])


def _standing(row: Any, responses: list[Response]) -> Standing:
    edit = row.kind == "edit"
    if edit:  # the user's own text stands for the better response
        responses.insert(0, Response(row.feedback_id, row.edit_sha256))
    vote = Vote(
        feedback_id=row.feedback_id,
        rater=RaterId(row.tenant, row.user_id),
        prompt_id=row.prompt_id,
        choice=Choice(row.choice),
        a=responses[0],
        b=responses[1] if len(responses) > 1 else None,
        received_at=row.received_at,
        prompt_sha256=row.prompt_sha256 or b"",
        edit=edit,
        gold=None if row.chosen is None else Choice.A if row.chosen == responses[0].generation_id else Choice.B,
        user_rank=row.user_rank,
        tenant_rank=row.tenant_rank,
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
        row.released,
    )


def _response(row: Row[Any], learn_from_cut: bool) -> Response:
    return Response(row.generation_id, row.text_sha256, row.empty, row.cut and not learn_from_cut, row.version)
