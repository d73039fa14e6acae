"""Curation of one prompt and its duplicates: from all their votes to a decision on each.

    quarantine, caps ─▶ last of a rater on an item ─▶ ties, too little to judge ─▶ thumbs into pairs
        ─▶ net the votes of a pair ─▶ drop what lies on a cycle ─▶ cap the group

Weights are counted in whole thousandths, so that sums do not depend on the order of the votes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeAlias

import networkx as nx

from services.collector.curation.raters import Raters
from services.collector.curation.reasons import Reason
from services.collector.curation.settings import CurationSettings
from services.collector.curation.thumbs import pair_thumbs
from services.collector.curation.votes import Choice, Decision, Overrides, RaterId, Response, State, Vote

Edge: TypeAlias = tuple[bytes, bytes]
"""Hashes of the texts of the better and the worse response."""

_UNIT = 1_000


@dataclass(frozen=True, slots=True)
class _Judgement:
    """One vote, or two paired thumbs, that one response is better than another."""

    votes: tuple[Vote, ...]
    chosen: Response
    rejected: Response
    weight: int
    """In thousandths."""

    @property
    def edge(self) -> Edge:
        return self.chosen.sha256, self.rejected.sha256

    @property
    def key(self) -> tuple[bytes, Edge]:
        """An order that has nothing to do with time, and that nobody can choose."""
        names = "\n".join(f"{vote.rater.tenant}\t{vote.rater.user_id}" for vote in self.votes)
        return sha256(names.encode()).digest(), self.edge


def curate(
    votes: Iterable[Vote],
    raters: Raters,
    settings: CurationSettings | None = None,
    overrides: Overrides | None = None,
) -> list[Decision]:
    """A decision on each vote of one group of prompts of one tenant, in the order of their feedback ids.

    All votes of the group belong here, superseded ones included, retracted ones not. The order in which they come
    makes no difference. A later vote may change the decision on an earlier one: compare with what was decided before,
    and tell of what changed.
    """
    settings = settings or CurationSettings()
    overrides = overrides or Overrides()
    decisions: list[Decision] = []
    judgements: list[_Judgement] = []
    thumbs: list[Vote] = []
    ties: list[Vote] = []
    last, superseded = _last_of_each(votes)
    decisions.extend(Decision(vote.feedback_id, State.APART, Reason.SUPERSEDED) for vote in superseded)
    for vote in last:
        verdict = _standing(vote, raters, settings, overrides) or _too_little(vote)
        if verdict is not None and verdict[1] is Reason.TIE and settings.publish_ties and _differ(vote):
            ties.append(vote)
        elif verdict is not None:
            decisions.append(Decision(vote.feedback_id, *verdict))
        elif vote.b is None:
            thumbs.append(vote)
        else:
            won = vote.choice is Choice.A
            weight = _thousandths(raters[vote.rater].weight)
            judgements.append(_Judgement((vote,), vote.a if won else vote.b, vote.b if won else vote.a, weight))
    if thumbs:
        compared = {(judged.votes[0].rater, frozenset(judged.edge)) for judged in judgements}
        pairs, alone = pair_thumbs(thumbs, compared)
        for up, down in pairs:
            # Two people's thumbs say no more than the less reliable of the two.
            weight = min(_thousandths(raters[up.rater].weight), _thousandths(raters[down.rater].weight))
            judgements.append(_Judgement((up, down), up.a, down.a, weight))
        for vote in alone:
            weight = _thousandths(raters[vote.rater].weight)
            decisions.append(Decision(vote.feedback_id, State.RECORDED, Reason.UNPAIRED_THUMB, weight / _UNIT))
    decisions.extend(_resolve(judgements, settings))
    decisions.extend(_ties(ties, raters, settings))
    decisions.sort(key=lambda decision: decision.feedback_id)
    return decisions


def _last_of_each(votes: Iterable[Vote]) -> tuple[list[Vote], list[Vote]]:
    """The last vote of each rater on each item, and the others."""
    last: dict[tuple[RaterId, object], Vote] = {}
    superseded: list[Vote] = []
    for vote in votes:
        item = vote.rater, _item(vote)
        before = last.get(item)
        if before is None or vote.order > before.order:
            last[item] = vote
        if before is not None:
            superseded.append(min(vote, before, key=lambda one: one.order))
    return list(last.values()), superseded


def _item(vote: Vote) -> object:
    """What is judged: a response, an original that is edited, or an unordered pair of texts."""
    if vote.b is None:
        return "thumb", vote.a.sha256
    if vote.edit:
        return "edit", vote.b.sha256
    return frozenset((vote.a.sha256, vote.b.sha256))


def _standing(
    vote: Vote, raters: Raters, settings: CurationSettings, overrides: Overrides
) -> tuple[State, Reason] | None:
    """Whether the rater, or the caps, keep the vote from counting at all."""
    rater = raters[vote.rater]
    if vote.rater not in overrides.released and vote.feedback_id not in overrides.released_feedback:
        if vote.rater in overrides.quarantined:
            return State.QUARANTINED, Reason.QUARANTINED_MANUALLY
        if rater.quarantine is not None:
            return State.QUARANTINED, rater.quarantine
        if any(start <= vote.received_at < end for start, end in rater.bursts):
            return State.QUARANTINED, Reason.QUARANTINED_BURST
    if vote.user_rank >= settings.user_votes_per_day or _thousandths(rater.weight) == 0:
        return State.APART, Reason.OVER_USER_CAP
    if vote.tenant_rank >= settings.tenant_votes_per_day:
        return State.APART, Reason.OVER_TENANT_CAP
    if vote.gold is not None:
        return State.RECORDED, Reason.GOLD
    return None


def _too_little(vote: Vote) -> tuple[State, Reason] | None:
    """Whether the vote says too little to learn from."""
    if vote.choice is Choice.TIE:
        return State.APART, Reason.TIE
    if vote.choice is Choice.BOTH_BAD:
        return State.APART, Reason.BOTH_BAD
    if vote.b is not None and vote.a.sha256 == vote.b.sha256:
        return State.APART, Reason.SAME_TEXT
    if vote.a.empty or (vote.b is not None and vote.b.empty):
        return State.APART, Reason.EMPTY
    winner = {Choice.A: vote.a, Choice.UP: vote.a, Choice.B: vote.b}.get(vote.choice)
    if winner is not None and winner.cut:
        return State.APART, Reason.CUT
    return None


def _differ(vote: Vote) -> bool:
    """Whether there are two responses that can be told apart."""
    return vote.b is not None and vote.a.sha256 != vote.b.sha256 and not vote.a.empty and not vote.b.empty


def _ties(ties: list[Vote], raters: Raters, settings: CurationSettings) -> Iterator[Decision]:
    """Kept apart from what is preferred, and emitted as what they are, as many as there may be comparisons."""
    ties.sort(
        key=lambda vote: sha256(f"{vote.rater.tenant}\t{vote.rater.user_id}\n{vote.feedback_id}".encode()).digest()
    )
    for place, vote in enumerate(ties):
        assert vote.b is not None
        if place >= settings.group_votes:
            yield Decision(vote.feedback_id, State.APART, Reason.TIE)
            continue
        weight = _thousandths(raters[vote.rater].weight) / _UNIT
        responses = vote.a.generation_id, vote.b.generation_id
        yield Decision(vote.feedback_id, State.APART, Reason.TIE, weight, *responses, "", emits=True)


def _resolve(judgements: list[_Judgement], settings: CurationSettings) -> list[Decision]:
    """Nets the judgements into edges, drops those inside a cycle, and weighs what stays."""
    by_edge: dict[Edge, list[_Judgement]] = defaultdict(list)
    for judged in judgements:
        by_edge[judged.edge].append(judged)
    weights = {edge: sum(judged.weight for judged in of_edge) for edge, of_edge in by_edge.items()}
    net = {edge: weight - weights.get(edge[::-1], 0) for edge, weight in weights.items()}
    cyclic = edges_on_cycles([edge for edge, weight in net.items() if weight > 0])
    decisions: list[Decision] = []
    accepted: list[tuple[_Judgement, int]] = []
    for edge, of_edge in by_edge.items():
        reason = None
        if net[edge] < 0:
            reason = Reason.OUTVOTED
        elif edge in cyclic:
            reason = Reason.CYCLE
        for judged in of_edge:
            # What speaks against the pair is shared out over what speaks for it; perhaps nothing remains.
            weight = 0 if reason else judged.weight * net[edge] // weights[edge]
            if weight > 0:
                accepted.append((judged, weight))
            else:
                decisions.extend(_apart(judged, reason or Reason.CONTESTED))
    if len(accepted) > settings.group_votes:
        accepted.sort(key=lambda pair: pair[0].key)
        for judged, _ in accepted[settings.group_votes :]:
            decisions.extend(_apart(judged, Reason.OVER_GROUP_CAP))
        del accepted[settings.group_votes :]
    for judged, weight in accepted:
        decisions.extend(_accepted(judged, weight))
    return decisions


def edges_on_cycles(edges: list[Edge]) -> set[Edge]:
    """The edges inside a strongly connected component of two nodes or more: all that lie on a cycle."""
    if not {better for better, _ in edges} & {worse for _, worse in edges}:
        return set()  # Nothing both wins and loses: the usual case, and much faster to see than by components.
    graph: nx.DiGraph[bytes] = nx.DiGraph(edges)
    component = {node: i for i, nodes in enumerate(nx.strongly_connected_components(graph)) for node in nodes}
    return {edge for edge in edges if component[edge[0]] == component[edge[1]]}


def _accepted(judged: _Judgement, weight: int) -> list[Decision]:
    chosen, rejected = judged.chosen.generation_id, judged.rejected.generation_id
    if len(judged.votes) == 1:
        (vote,) = judged.votes
        return [
            Decision(
                vote.feedback_id, State.ACCEPTED, Reason.PREFERRED, weight / _UNIT, chosen, rejected, "", emits=True
            )
        ]
    up, down = judged.votes
    return [
        Decision(
            vote.feedback_id,
            State.ACCEPTED,
            Reason.PAIRED_THUMBS,
            weight / _UNIT,
            chosen,
            rejected,
            partner.feedback_id,
            emits=vote is up,
        )
        for vote, partner in ((up, down), (down, up))
    ]


def _apart(judged: _Judgement, reason: Reason) -> list[Decision]:
    return [Decision(vote.feedback_id, State.APART, reason) for vote in judged.votes]


def _thousandths(weight: float) -> int:
    return round(weight * _UNIT)
