"""Curation, live: what stands of a group of prompts is judged anew with every vote, and what changed is told.

judgements of the group ──▶ curate ──▶ states of the feedback · samples to learn from
                                              │ compared with what stood before
                                              ▼
                      one transaction: feedback · decisions · outbox (ACCEPTED, RETRACTED)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from services.collector import emit, many, outbox, records, standing
from services.collector.curation import Decision, Reason, Vote, curate
from services.collector.emit import COMPARISON, THUMB, Sample, Voted
from services.collector.identity import derived
from services.collector.records import Recorded
from services.collector.rules import Rules
from services.collector.standing import Fresh, Standing
from services.collector.tables import decision_votes, decisions, feedback, generations
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import Feedback

ACCEPTED, RETRACTED = "ACCEPTED", "RETRACTED"
RETRACTED_BY_USER = "retracted_by_user"


# Built once: building a statement takes longer than running it.
_STANDS = (
    update(feedback)
    .where(feedback.c.feedback_id == bindparam("id"))
    .values(
        state=bindparam("to_state"),
        reason=bindparam("to_reason"),
        weight=bindparam("to_weight"),
        comparison_id=bindparam("to_comparison_id"),
        superseded_by=bindparam("to_superseded_by"),
        revision=feedback.c.revision + 1,
    )
)
_FEEDBACK = (
    select(feedback)
    .where(feedback.c.feedback_id.in_(bindparam("of_ids", expanding=True)))
    .order_by(feedback.c.feedback_id)
)
_INSERT_FEEDBACK = insert(feedback)
_DECISIONS = """
SELECT sample_id, kind, prompt_id, group_id, state, weight, revision FROM decisions
WHERE tenant = :tenant AND group_id IN (:many) ORDER BY sample_id
"""
_EVENTS = select(generations.c.generation_id, generations.c.event).where(
    generations.c.generation_id.in_(bindparam("of_ids", expanding=True))
)


_Grouped: TypeAlias = tuple[outbox.Event, str]
"""An event, and the group of prompts that it is about."""


class _Outcome(NamedTuple):
    """Where a piece of feedback is to stand."""

    state: str
    reason: str
    weight: float
    comparison_id: str
    superseded_by: str


class Decided(NamedTuple):
    """What came of curation, written down and to be published."""

    told: Sequence[Recorded]
    feedback: Mapping[str, outbox.Event]
    """What is told of each piece of feedback, by id."""

    samples: Sequence[outbox.Event]
    """What is accepted to learn from, and taken back."""


def decide(
    connection: Connection,
    rules: Rules,
    tenant: str,
    groups: Collection[str],
    *,
    new: Collection[str] = (),
    traceparent: str = "",
) -> list[Recorded]:
    """Curates these groups and publishes what changed. Feedback in `new` is told of whether it changed or not.

    Returns the feedback that was told of.
    """
    made = decided(connection, rules, tenant, groups, new=new, traceparent=traceparent)
    outbox.add(connection, [*made.feedback.values(), *made.samples])
    return list(made.told)


def decided(
    connection: Connection,
    rules: Rules,
    tenant: str,
    groups: Collection[str],
    *,
    new: Collection[str] = (),
    fresh: Sequence[Fresh] = (),
    traceparent: str = "",
) -> Decided:
    """As `decide`, but leaves publishing to the caller. `fresh` is written down with what it comes to, and told of."""
    stood = standing.of_groups(connection, tenant, groups, learn_from_cut=rules.learn_from_cut)
    judged = [*stood, *(one.standing for one in fresh)]
    made = _curated(connection, rules, judged)
    samples = _samples(judged, made)
    outcomes = _outcomes(judged, made, samples)
    told = [*_put_feedback(connection, stood, outcomes, new), *_put_fresh(connection, fresh, outcomes)]
    reasons = {id: outcome.reason for id, outcome in outcomes.items()}
    own = {one.values["feedback_id"]: one for one in fresh}
    # What several decide together is of the trace of the last of them.
    traces = {one.standing.group: one.traceparent for one in fresh}
    events = _put_samples(connection, tenant, groups, samples, reasons, own)
    group_of = {one.vote.feedback_id: one.group for one in judged}

    def trace_of(id: str) -> str:
        return own[id].traceparent if id in own else traces.get(group_of[id], traceparent)

    return Decided(
        [recorded for recorded, _ in told],
        {
            one.record.feedback_id: records.event_of(one, prompt_id, trace_of(one.record.feedback_id))
            for one, prompt_id in told
        },
        [event._replace(traceparent=traces.get(group, traceparent)) for event, group in events],
    )


def _curated(connection: Connection, rules: Rules, stood: Sequence[Standing]) -> dict[str, Decision]:
    raters, overrides = standing.raters_of(connection, {one.vote.rater for one in stood}, rules.curation)
    released = frozenset(one.vote.feedback_id for one in stood if one.released)
    overrides = replace(overrides, released_feedback=released)
    by_group: dict[str, list[Standing]] = {}
    for one in stood:
        by_group.setdefault(one.group, []).append(one)
    made: dict[str, Decision] = {}
    for together in by_group.values():
        votes = [one.vote for one in together]
        made |= {decision.feedback_id: decision for decision in curate(votes, raters, rules.curation, overrides)}
    return made


def _samples(stood: Iterable[Standing], made: dict[str, Decision]) -> dict[str, Sample]:
    samples = {}
    for one in stood:
        decision = made[one.vote.feedback_id]
        if decision.emits:  # accepted, or a tie
            id, votes = one.sample_id, [decision.feedback_id]
            if decision.partner:
                id, votes = derived(decision.feedback_id, "pair", decision.partner), [*votes, decision.partner]
            told = (decision.reason.value, decision.weight, tuple(votes), decision.chosen, decision.rejected)
            samples[id] = Sample(id, COMPARISON, one.vote.prompt_id, one.group, *told)
        elif decision.reason == Reason.UNPAIRED_THUMB:
            lone = (decision.reason.value, decision.weight, (decision.feedback_id,), one.vote.a.generation_id)
            samples[one.sample_id] = Sample(one.sample_id, THUMB, one.vote.prompt_id, one.group, *lone)
    return samples


def _outcomes(stood: Sequence[Standing], made: dict[str, Decision], samples: dict[str, Sample]) -> dict[str, _Outcome]:
    sample_of = {id: sample.id for sample in samples.values() if sample.kind == COMPARISON for id in sample.votes}
    last: dict[object, str] = {}
    if any(decision.reason is Reason.SUPERSEDED for decision in made.values()):
        in_order = sorted((one.vote for one in stood), key=lambda vote: vote.order)
        last = {_judged(vote): vote.feedback_id for vote in in_order}
    outcomes = {}
    for one in stood:
        id = one.vote.feedback_id
        decision = made[id]
        superseded = decision.reason is Reason.SUPERSEDED
        outcomes[id] = _Outcome(
            state="SUPERSEDED" if superseded else decision.state.value,
            reason=decision.reason.value,
            weight=decision.weight,
            comparison_id=sample_of.get(id, one.comparison_id),
            superseded_by=last[_judged(one.vote)] if superseded else "",
        )
    return outcomes


def _judged(vote: Vote) -> tuple[str, str, frozenset[bytes]]:
    """Who judged what. Responses of one text are one response."""
    texts = {vote.a.sha256} if vote.b is None else {vote.b.sha256} if vote.edit else {vote.a.sha256, vote.b.sha256}
    kind = "thumb" if vote.b is None else "edit" if vote.edit else "comparison"
    return vote.rater.user_id, kind, frozenset(texts)


def _put_feedback(
    connection: Connection, stood: Iterable[Standing], outcomes: dict[str, _Outcome], new: Collection[str]
) -> list[tuple[Recorded, str]]:
    """Writes what feedback changed, and returns it with the prompt it is about."""
    before = {
        one.vote.feedback_id: _Outcome(one.state, one.reason, one.weight, one.comparison_id, one.superseded_by)
        for one in stood
    }
    changed = [id for id, stood_as in before.items() if id in new or outcomes[id] != stood_as]
    if not changed:
        return []
    connection.execute(
        _STANDS,
        [
            {"id": id, **{f"to_{name}": value or None for name, value in outcomes[id]._asdict().items()}}
            | {"to_weight": outcomes[id].weight}
            for id in changed
        ],
    )
    rows = connection.execute(_FEEDBACK, {"of_ids": changed})
    return [(records.recorded(row, changed=True), row.prompt_id) for row in rows]


def _put_fresh(
    connection: Connection, fresh: Sequence[Fresh], outcomes: dict[str, _Outcome]
) -> list[tuple[Recorded, str]]:
    """Writes down what is being recorded with what it came to, and returns it with the prompt it is about."""
    if not fresh:
        return []
    for one in fresh:
        outcome = outcomes[one.values["feedback_id"]]
        one.values.update(outcome._asdict())
        one.values["comparison_id"] = outcome.comparison_id or None
        one.values["superseded_by"] = outcome.superseded_by or None
    connection.execute(_INSERT_FEEDBACK, [one.values for one in fresh])
    return [(records.new(one.values, one.body), one.values["prompt_id"]) for one in fresh]


def _put_samples(
    connection: Connection,
    tenant: str,
    groups: Collection[str],
    samples: dict[str, Sample],
    reasons: dict[str, str],
    fresh: Mapping[str, Fresh],
) -> list[_Grouped]:
    """Writes what is learnt from, and returns what is to be published: first what is taken back."""
    rows = many.find(connection, _DECISIONS, list(groups), tenant=tenant)
    before = {row.sample_id: row for row in rows}
    gone = [row for row in before.values() if row.state == ACCEPTED and row.sample_id not in samples]
    come = [
        sample
        for id, sample in samples.items()
        if id not in before or before[id].state != ACCEPTED or before[id].weight != sample.weight
    ]
    if not gone and not come:
        return []
    events = _retract(connection, tenant, gone, reasons) if gone else []
    if come:
        events += _accept(connection, tenant, come, {id: row.revision for id, row in before.items()}, fresh)
    return events


def _retract(connection: Connection, tenant: str, gone: Sequence[Row[Any]], reasons: dict[str, str]) -> list[_Grouped]:
    votes: dict[str, list[str]] = {row.sample_id: [] for row in gone}
    rests = select(decision_votes).where(decision_votes.c.sample_id.in_(list(votes)))
    for row in connection.execute(rests.order_by(decision_votes.c.sample_id, decision_votes.c.place)):
        votes[row.sample_id].append(row.feedback_id)
    events, values = [], []
    for row in gone:
        rests_on = votes[row.sample_id]
        why = reasons[rests_on[0]] if all(id in reasons for id in rests_on) else RETRACTED_BY_USER
        revision = row.revision + 1
        event = emit.retracted(row.sample_id, row.kind, revision, tenant, row.prompt_id, rests_on, why)
        events.append((_to_publish(event, row.kind), row.group_id))
        values.append({"id": row.sample_id, "to_reason": why, "to_revision": revision, "now": outbox.now_micros()})
    connection.execute(
        update(decisions)
        .where(decisions.c.sample_id == bindparam("id"))
        .values(
            state=RETRACTED,
            reason=bindparam("to_reason"),
            weight=0.0,
            revision=bindparam("to_revision"),
            decided_at=bindparam("now"),
        ),
        values,
    )
    return events


def _accept(
    connection: Connection,
    tenant: str,
    come: Sequence[Sample],
    revisions: dict[str, int],
    fresh: Mapping[str, Fresh],
) -> list[_Grouped]:
    bodies = _votes(connection, come, fresh)
    wanted = {id for sample in come for id in (sample.chosen, sample.rejected) if id}
    read = {id: event for one in fresh.values() for id, event in one.events.items() if id in wanted}
    if others := wanted - read.keys():
        read |= {row.generation_id: row.event for row in connection.execute(_EVENTS, {"of_ids": list(others)})}
    known = {id: GenerationEvent.FromString(event) for id, event in read.items()}
    again = [sample.id for sample in come if sample.id in revisions]
    if again:
        connection.execute(delete(decision_votes).where(decision_votes.c.sample_id.in_(again)))
        connection.execute(delete(decisions).where(decisions.c.sample_id.in_(again)))
    events, rows, rests, now = [], [], [], outbox.now_micros()
    for sample in come:
        first, revision = bodies[sample.votes[0]], revisions.get(sample.id, 0) + 1
        voted = first._replace(received_at=max(bodies[id].received_at for id in sample.votes))
        event = emit.accepted(sample, revision, tenant, voted, known)
        events.append((_to_publish(event, sample.kind), sample.group))
        rows.append(
            {
                "sample_id": sample.id,
                "kind": sample.kind,
                "tenant": tenant,
                "prompt_id": sample.prompt_id,
                "group_id": sample.group,
                "state": ACCEPTED,
                "reason": sample.reason,
                "weight": sample.weight,
                "revision": revision,
                "decided_at": now,
            }
        )
        rests += [{"sample_id": sample.id, "place": place, "feedback_id": id} for place, id in enumerate(sample.votes)]
    connection.execute(insert(decisions), rows)
    connection.execute(insert(decision_votes), rests)
    return events


def _votes(connection: Connection, come: Iterable[Sample], fresh: Mapping[str, Fresh]) -> dict[str, Voted]:
    """The feedback that samples rest on, by id."""
    ids = {id for sample in come for id in sample.votes}
    voted = {}
    for id in ids & fresh.keys():
        values = fresh[id].values
        voted[id] = Voted(fresh[id].body, values["kind"], values["received_at"], values["propensity"])
    if older := ids - fresh.keys():
        for row in connection.execute(_FEEDBACK, {"of_ids": list(older)}):
            voted[row.feedback_id] = Voted(Feedback.FromString(row.body), row.kind, row.received_at, row.propensity)
    return voted


def _to_publish(event: emit.SampleEvent, kind: str) -> outbox.Event:
    topic = topics.THUMBS if kind == THUMB else topics.COMPARISONS
    return outbox.Event(event.event_id, topic, event.prompt_id, event)
