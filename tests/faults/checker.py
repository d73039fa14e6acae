"""The history checker: decides from what clients were told, what the stream carried, and what the database holds.

It imports nothing of the code under test. What it holds:

    journal   each submission: asked, then acknowledged with an id; each retraction the same
    stream    every record that a reader saw, over all lives of the broker, in the order of reading
    tables    feedback, feedback_generations and outbox, by plain SQL, once everything has settled

An acknowledged submission is in the database once, under the id that was acknowledged, and on the stream; of each vote,
a reader that drops event ids it has seen gets one acceptance, with the response that the user chose; what was retracted
is retracted on the stream, after its acceptance; and records of one key come in the order of their commits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ACCEPTED = "ACCEPTED"
RETRACTED = "RETRACTED"


@dataclass(frozen=True, slots=True)
class Vote:
    """What a client submits: of the responses `chosen` and `rejected`, or a thumb, where both are empty."""

    key: str
    prompt_id: str
    chosen: str = ""
    rejected: str = ""

    @property
    def compares(self) -> bool:
        """Whether a comparison is to come of it."""
        return bool(self.chosen)


class Asked(NamedTuple):
    """About to be sent, whether for the first time or again."""

    vote: Vote


class Acked(NamedTuple):
    """The collector said OK to the submission with this key."""

    key: str
    feedback_id: str


class AskedToRetract(NamedTuple):
    """About to be sent."""

    feedback_id: str


class AckedRetraction(NamedTuple):
    """The collector said OK."""

    feedback_id: str


Entry = Asked | Acked | AskedToRetract | AckedRetraction


class Delivery(NamedTuple):
    """A record as a reader saw it. `life` counts the broker's restarts; `state` is the state's name, unprefixed."""

    life: int
    topic: str
    key: str
    event_id: str
    state: str
    feedback_ids: tuple[str, ...]
    comparison_id: str = ""
    chosen: str = ""
    rejected: str = ""


class FeedbackRow(NamedTuple):
    """A row of `feedback`, with the number of its rows in `feedback_generations`."""

    feedback_id: str
    key: str
    state: str
    comparison_id: str
    generations: int


class OutboxRow(NamedTuple):
    """A row of `outbox`."""

    id: int
    event_id: str
    topic: str
    key: str
    published: bool


@dataclass(frozen=True, slots=True)
class History:
    """All that is known. `feedback_topic` and `comparisons_topic` are names of topics."""

    journal: Sequence[Entry]
    stream: Sequence[Delivery]
    feedback: Sequence[FeedbackRow]
    outbox: Sequence[OutboxRow]
    feedback_topic: str
    comparisons_topic: str
    last_life: int = 0

    def once(self, topic: str, life: int | None = None) -> Iterator[Delivery]:
        """A topic as a reader has it who drops event ids that it has seen; in one life of the broker, or in all."""
        seen: set[str] = set()
        for record in self.stream:
            if record.topic == topic and life in (None, record.life) and record.event_id not in seen:
                seen.add(record.event_id)
                yield record


@dataclass(frozen=True, slots=True)
class Verdict:
    """The violations by kind, each in words."""

    lost: Sequence[str] = ()
    doubled: Sequence[str] = ()
    reordered: Sequence[str] = ()
    wrong: Sequence[str] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing was violated."""
        return not (self.lost or self.doubled or self.reordered or self.wrong)


def check(history: History) -> Verdict:
    """The verdict on a history that has settled."""
    acked = [entry for entry in history.journal if isinstance(entry, Acked)]
    return Verdict(
        lost=list(_lost(history)),
        doubled=list(_doubled(history)),
        reordered=list(_reordered(history)),
        wrong=list(_wrong(history)),
        counts={
            "submissions": len({e.vote.key for e in history.journal if isinstance(e, Asked)}),
            "acknowledged": len({entry.key for entry in acked}),
            "retracted": len({e.feedback_id for e in history.journal if isinstance(e, AckedRetraction)}),
            "comparisons": len({d.comparison_id for d in history.stream if d.state == ACCEPTED and d.comparison_id}),
            "records": len(history.stream),
            "repeated": len(history.stream) - len({d.event_id for d in history.stream}),
        },
    )


def _votes(history: History) -> dict[str, Vote]:
    return {entry.vote.key: entry.vote for entry in history.journal if isinstance(entry, Asked)}


def _lost(history: History) -> Iterator[str]:
    """What was acknowledged, and is not there; in the database, or on the stream as it is after the last restart."""
    votes = _votes(history)
    rows = {row.key: row for row in history.feedback}
    told = {id for d in history.once(history.feedback_topic, history.last_life) for id in d.feedback_ids}
    last = list(history.once(history.comparisons_topic, history.last_life))
    accepted = {id for d in last if d.state == ACCEPTED for id in d.feedback_ids}
    retracted = {id for d in last if d.state == RETRACTED for id in d.feedback_ids}
    # Taken back before its generations came, nothing is derived from it.
    asked = {entry.feedback_id for entry in history.journal if isinstance(entry, AskedToRetract)}
    taken_back = {row.feedback_id for row in history.feedback if row.state == RETRACTED} & asked
    for entry in history.journal:
        match entry:
            case Acked(key, id):
                if key not in rows or rows[key].feedback_id != id:
                    yield f"{key} was acknowledged as {id}; the database has {rows.get(key)}"
                if id not in told:
                    yield f"{id} was acknowledged and is not on the feedback topic"
                if votes[key].compares and id not in accepted and id not in taken_back:
                    yield f"{id} was acknowledged and no comparison of it was delivered"
            case AckedRetraction(id):
                states = {row.state for row in history.feedback if row.feedback_id == id}
                if states != {RETRACTED}:
                    yield f"{id} was retracted; the database says {states or 'nothing'}"
                if id in accepted and id not in retracted:
                    yield f"the retraction of {id} was not delivered"
    for row in history.outbox:
        if not row.published:
            yield f"event {row.event_id} was never published"
    delivered = {d.event_id for d in history.stream if d.life == history.last_life}
    for row in history.outbox:
        if row.topic in (history.feedback_topic, history.comparisons_topic) and row.event_id not in delivered:
            yield f"event {row.event_id} is marked as published and is not on the stream"


def _doubled(history: History) -> Iterator[str]:
    """What counts twice: in the database, or with a reader that drops repeated event ids, over all restarts."""
    for key, count in Counter(row.key for row in history.feedback).items():
        if count > 1:
            yield f"{key} is in the database {count} times"
    ids: dict[str, set[str]] = defaultdict(set)
    for entry in history.journal:
        if isinstance(entry, Acked):
            ids[entry.key].add(entry.feedback_id)
    for key, several in ids.items():
        if len(several) > 1:
            yield f"{key} was acknowledged under {len(several)} ids"
    for state in (ACCEPTED, RETRACTED):
        records = [d for d in history.once(history.comparisons_topic) if d.state == state]
        for what, count in Counter(id for d in records for id in d.feedback_ids).items():
            if count > 1:
                yield f"feedback {what} came as {state} {count} times"
        for what, count in Counter(d.comparison_id for d in records).items():
            if count > 1:
                yield f"comparison {what} came as {state} {count} times"
    for (state, ids_told), count in Counter(
        (d.state, d.feedback_ids) for d in history.once(history.feedback_topic)
    ).items():
        if count > 1:
            yield f"feedback {', '.join(ids_told)} was told as {state} {count} times"


def _reordered(history: History) -> Iterator[str]:
    """Records of one key, out of the order of their commits; within a life of the broker, and over all of them."""
    place = {row.event_id: row.id for row in history.outbox}
    for topic in (history.feedback_topic, history.comparisons_topic):
        for life in (None, *sorted({d.life for d in history.stream})):
            last: dict[str, int] = {}
            for d in history.once(topic, life):
                here = place.get(d.event_id, 0)
                if here < last.get(d.key, 0):
                    yield f"{topic}, life {life}: event {d.event_id} of key {d.key} came after a later one"
                last[d.key] = max(here, last.get(d.key, 0))
    yield from _reordered_for_clients(history)


def _reordered_for_clients(history: History) -> Iterator[str]:
    """By the clients' own clock: what was acknowledged before another of its prompt was sent comes before it."""
    told = {id: i for i, d in reversed(list(enumerate(history.once(history.feedback_topic)))) for id in d.feedback_ids}
    acked: dict[str, list[str]] = defaultdict(list)  # by prompt
    before: dict[str, list[str]] = {}  # by key
    votes = _votes(history)
    joined = {row.feedback_id: row for row in history.feedback}
    for entry in history.journal:
        if isinstance(entry, Asked) and entry.vote.key not in before:
            before[entry.vote.key] = list(acked[entry.vote.prompt_id])
        elif isinstance(entry, Acked):
            earlier = [id for id in before[entry.key] if told.get(id, -1) > told.get(entry.feedback_id, len(told))]
            for id in earlier:
                yield f"{id} was acknowledged before {entry.feedback_id} was sent, and told after it"
            if entry.feedback_id in joined and entry.feedback_id not in acked[votes[entry.key].prompt_id]:
                acked[votes[entry.key].prompt_id].append(entry.feedback_id)
    place = {(d.comparison_id, d.state): i for i, d in enumerate(history.once(history.comparisons_topic))}
    for (comparison, state), i in place.items():
        if state == RETRACTED and place.get((comparison, ACCEPTED), len(place)) > i:
            yield f"comparison {comparison} was retracted before it was accepted"


def _wrong(history: History) -> Iterator[str]:
    """What does not say what the user said, nobody submitted, or is there by half."""
    votes = _votes(history)
    rows = {row.feedback_id: row for row in history.feedback}
    told = {id for d in history.stream if d.topic == history.feedback_topic for id in d.feedback_ids}
    retracted = {e.feedback_id for e in history.journal if isinstance(e, AskedToRetract)}
    for row in history.feedback:
        vote = votes.get(row.key)
        if vote is None:
            yield f"{row.feedback_id} is in the database, and nobody submitted it"
            continue
        if row.generations != (2 if vote.compares else 1):
            yield f"{row.feedback_id} refers to {row.generations} generations: it is half-written"
        if row.feedback_id not in told:
            yield f"{row.feedback_id} has no event: it is half-written"
        if row.state == RETRACTED and row.feedback_id not in retracted:
            yield f"{row.feedback_id} is retracted, and nobody asked for it"
    kept = {row.event_id for row in history.outbox}
    for d in history.stream:
        if d.event_id not in kept:
            yield f"event {d.event_id} was published and is not in the outbox"
        for id in d.feedback_ids:
            if id not in rows:
                yield f"{d.topic} tells of {id}, which is not in the database"
            elif d.topic == history.comparisons_topic and d.state == ACCEPTED:
                vote = votes.get(rows[id].key)
                if vote is not None and (d.chosen, d.rejected) != (vote.chosen, vote.rejected):
                    yield f"{id} chose {vote.chosen}, and its comparison says {d.chosen}"
                if rows[id].comparison_id != d.comparison_id:
                    yield f"{id} has comparison {rows[id].comparison_id}, and {d.comparison_id} was delivered"
