"""What becomes of the votes on one prompt."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.collector.curation import (
    Choice,
    CurationSettings,
    Decision,
    Overrides,
    Rater,
    RaterId,
    Raters,
    Reason,
    State,
    Vote,
    curate,
)
from tests.unit.services.collector.curation.voting import compare, response, thumb

SETTINGS = CurationSettings()
EQUAL = Raters.none(SETTINGS)


def decided(votes: list[Vote], raters: Raters = EQUAL, **overrides: frozenset[object]) -> list[tuple[str, str, float]]:
    """State, reason and weight of each vote, in the order of the votes."""
    by_id = {one.feedback_id: one for one in curate(votes, raters, SETTINGS, Overrides(**overrides))}  # type: ignore[arg-type]
    assert len(by_id) == len(votes)
    return [
        (by_id[vote.feedback_id].state, by_id[vote.feedback_id].reason, by_id[vote.feedback_id].weight)
        for vote in votes
    ]


def weighing(**weights: float) -> Raters:
    """A snapshot in which these users have these weights."""
    known = {RaterId("acme", user): Rater(0.75, weight) for user, weight in weights.items()}
    return Raters(EQUAL.newcomer, known)


ACCEPTED = (State.ACCEPTED, Reason.PREFERRED, 1.0)


def apart(reason: Reason) -> tuple[State, Reason, float]:
    return State.APART, reason, 0.0


def test_a_preference_is_accepted_whichever_was_shown_first() -> None:
    first = compare("ann", "x", "y")
    second = replace(compare("bob", "z", "y"), choice=Choice.B)
    assert curate([second, first], EQUAL) == [
        Decision(first.feedback_id, State.ACCEPTED, Reason.PREFERRED, 1.0, "x", "y", "", emits=True),
        Decision(second.feedback_id, State.ACCEPTED, Reason.PREFERRED, 1.0, "y", "z", "", emits=True),
    ]


@pytest.mark.parametrize(
    ("vote", "reason"),
    [
        (replace(compare("ann", "x", "y"), choice=Choice.TIE), Reason.TIE),
        (replace(compare("ann", "x", "y"), choice=Choice.BOTH_BAD), Reason.BOTH_BAD),
        (replace(compare("ann", "x", "y"), b=replace(response("x"), generation_id="other")), Reason.SAME_TEXT),
        (replace(compare("ann", "x", "y"), b=response("y", empty=True)), Reason.EMPTY),
        (replace(compare("ann", "x", "y"), a=response("x", cut=True)), Reason.CUT),
        (replace(compare("ann", "x", "y"), choice=Choice.B, b=response("y", cut=True)), Reason.CUT),
        (replace(thumb("ann", "x", up=True), a=response("x", empty=True)), Reason.EMPTY),
        (replace(thumb("ann", "x", up=True), a=response("x", cut=True)), Reason.CUT),
        (compare("ann", "x", "y", user_rank=SETTINGS.user_votes_per_day), Reason.OVER_USER_CAP),
        (compare("ann", "x", "y", tenant_rank=SETTINGS.tenant_votes_per_day), Reason.OVER_TENANT_CAP),
    ],
)
def test_what_says_too_little_or_too_much_is_kept_apart(vote: Vote, reason: Reason) -> None:
    assert decided([vote]) == [apart(reason)]


def test_a_response_that_was_cut_off_may_lose() -> None:
    assert decided([replace(compare("ann", "x", "y"), b=response("y", cut=True))]) == [ACCEPTED]


def test_a_control_question_is_not_learnt_from() -> None:
    assert decided([compare("ann", "x", "y", gold=Choice.A)]) == [(State.RECORDED, Reason.GOLD, 0.0)]


def test_the_last_vote_of_a_rater_on_a_pair_counts() -> None:
    earlier, later = compare("ann", "x", "y"), compare("ann", "y", "x")
    assert decided([later, earlier]) == [ACCEPTED, apart(Reason.SUPERSEDED)]
    withdrawn = replace(compare("ann", "x", "y"), choice=Choice.TIE)
    assert decided([earlier, withdrawn]) == [apart(Reason.SUPERSEDED), apart(Reason.TIE)]


def test_two_tenants_never_share_a_rater() -> None:
    other = compare("ann", "x", "y", rater=RaterId("globex", "ann"))
    assert decided([compare("ann", "x", "y"), other]) == [ACCEPTED, ACCEPTED]


def test_contradicting_votes_net_out() -> None:
    for_x, for_y = compare("ann", "x", "y"), compare("bob", "y", "x")
    assert decided([for_x, for_y]) == [apart(Reason.CONTESTED)] * 2
    more = compare("cid", "x", "y")
    half = (State.ACCEPTED, Reason.PREFERRED, 0.5)
    assert decided([for_x, for_y, more]) == [half, apart(Reason.OUTVOTED), half]


def test_reliable_raters_weigh_more() -> None:
    votes = [compare("ann", "x", "y"), compare("bob", "y", "x")]
    kept = (State.ACCEPTED, Reason.PREFERRED, 0.7)
    assert decided(votes, weighing(ann=0.9, bob=0.2)) == [kept, apart(Reason.OUTVOTED)]


def test_a_vote_that_weighs_nothing_is_over_the_cap() -> None:
    assert decided([compare("ann", "x", "y")], weighing(ann=0.0004)) == [apart(Reason.OVER_USER_CAP)]


def test_a_later_vote_retracts_an_earlier_acceptance_by_closing_a_cycle() -> None:
    chain = [compare("ann", "x", "y"), compare("bob", "y", "z"), compare("dan", "w", "x")]
    assert decided(chain) == [ACCEPTED] * 3
    closing = compare("cid", "z", "x")
    assert decided([*chain, closing]) == [apart(Reason.CYCLE)] * 2 + [ACCEPTED, apart(Reason.CYCLE)]


def test_an_edit_is_a_comparison_that_the_users_own_text_wins() -> None:
    written = compare("ann", "mine", "x", edit=True)
    again = compare("ann", "mine, better", "x", edit=True)
    other = compare("ann", "mine too", "y", edit=True)
    assert decided([written, again, other]) == [apart(Reason.SUPERSEDED), ACCEPTED, ACCEPTED]


def test_a_group_has_only_so_many_comparisons() -> None:
    votes = [compare(f"user{i}", "x", "y") for i in range(10)]
    few = CurationSettings(group_votes=4)
    decisions = curate(votes, EQUAL, few)
    assert sorted(one.reason for one in decisions) == [Reason.OVER_GROUP_CAP] * 6 + [Reason.PREFERRED] * 4
    later = [replace(vote, received_at=vote.received_at + 7 * (i % 3)) for i, vote in enumerate(votes)]
    assert curate(later, EQUAL, few) == decisions  # Who is in has nothing to do with when they came.


def test_quarantine_and_release() -> None:
    ann = RaterId("acme", "ann")
    vote = compare("ann", "x", "y", received_at=50)
    for reason in (Reason.QUARANTINED_COLLUSION, Reason.QUARANTINED_UNRELIABLE):
        held = Raters(EQUAL.newcomer, {ann: Rater(0.5, 1.0, quarantine=reason)})
        assert decided([vote], held) == [(State.QUARANTINED, reason, 0.0)]
        assert decided([vote], held, released=frozenset({ann})) == [ACCEPTED]
        assert decided([vote], held, released_feedback=frozenset({vote.feedback_id})) == [ACCEPTED]
    fast = Raters(EQUAL.newcomer, {ann: Rater(0.75, 1.0, bursts=((0, 10), (50, 60)))})
    assert decided([vote], fast) == [(State.QUARANTINED, Reason.QUARANTINED_BURST, 0.0)]
    assert decided([replace(vote, received_at=60)], fast) == [ACCEPTED]
    manual = (State.QUARANTINED, Reason.QUARANTINED_MANUALLY, 0.0)
    assert decided([vote], quarantined=frozenset({ann})) == [manual]
    assert decided([vote], quarantined=frozenset({ann}), released=frozenset({ann})) == [ACCEPTED]


def test_a_quarantined_vote_does_not_outvote_anybody() -> None:
    held = Raters(EQUAL.newcomer, {RaterId("acme", "bot"): Rater(0.5, 1.0, quarantine=Reason.QUARANTINED_COLLUSION)})
    assert decided([compare("ann", "x", "y"), compare("bot", "y", "x")], held)[0] == ACCEPTED


def test_every_reason_is_explained() -> None:
    assert len({reason.explanation for reason in Reason}) == len(Reason)
    assert all(reason.explanation.endswith(".") and reason == str(reason) for reason in Reason)


TEXTS = "uvwxyz"


@st.composite
def some_votes(draw: st.DrawFn) -> list[Vote]:
    """Votes of a few raters on a few responses, thumbs and edits among them; many contradict or repeat each other."""
    votes = []
    for _ in range(draw(st.integers(0, 25))):
        user, rank = draw(st.sampled_from("abcd")), draw(st.integers(195, 204))
        one, other = draw(st.permutations(TEXTS))[:2]
        match draw(st.sampled_from(["comparison", "comparison", "thumb", "edit"])):
            case "comparison":
                choice = draw(st.sampled_from([Choice.A, Choice.B, Choice.TIE]))
                votes.append(replace(compare(user, one, other, user_rank=rank), choice=choice))
            case "thumb":
                votes.append(thumb(user, one, up=draw(st.booleans()), user_rank=rank))
            case _:
                votes.append(compare(user, f"{user}'s {other}", one, edit=True, user_rank=rank))
    return votes


RATERS = weighing(a=1.0, b=0.8, c=0.517, d=0.1)


@settings(deadline=None)
@given(some_votes(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_makes_no_difference(votes: list[Vote], chance: random.Random) -> None:
    shuffled = chance.sample(votes, len(votes))
    assert repr(curate(shuffled, RATERS)) == repr(curate(votes, RATERS))


@settings(deadline=None)
@given(some_votes(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference_to_the_same_final_votes(
    votes: list[Vote], chance: random.Random
) -> None:
    votes = [replace(vote, user_rank=0) for vote in votes]
    superseded = {one.feedback_id for one in curate(votes, RATERS) if one.reason is Reason.SUPERSEDED}
    final = [vote for vote in votes if vote.feedback_id not in superseded]
    when = chance.sample(range(100, 100 + len(final)), len(final))
    # Other times, other ids, and another history before them.
    history = [replace(vote, choice=flipped(vote.choice), received_at=i) for i, vote in enumerate(final)]
    again = [replace(vote, feedback_id=f"g{at}", received_at=at) for vote, at in zip(final, when, strict=True)]
    assert accepted([*again, *history]) == accepted(votes)


def flipped(choice: Choice) -> Choice:
    flips = {Choice.A: Choice.B, Choice.B: Choice.A, Choice.UP: Choice.DOWN, Choice.DOWN: Choice.UP}
    return flips.get(choice, choice)


def accepted(votes: list[Vote]) -> set[tuple[RaterId, str, str, float, RaterId | None]]:
    """Who prefers what to what, with which weight, and with whose thumb."""
    rater = {vote.feedback_id: vote.rater for vote in votes}
    return {
        (rater[one.feedback_id], one.chosen, one.rejected, one.weight, rater.get(one.partner))
        for one in curate(votes, RATERS)
        if one.state is State.ACCEPTED
    }


@settings(deadline=None)
@given(st.sets(st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)).filter(lambda edge: edge[0] < edge[1])))
def test_an_acyclic_set_is_never_touched(edges: set[tuple[str, str]]) -> None:
    votes = [compare(f"user{i}", *edge) for i, edge in enumerate(sorted(edges))]
    assert decided(votes) == [ACCEPTED] * len(votes)


@settings(deadline=None)
@given(
    st.sets(st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)).filter(lambda edge: edge[0] < edge[1])),
    st.permutations(TEXTS),
    st.integers(3, 6),
)
def test_a_planted_cycle_is_always_removed(edges: set[tuple[str, str]], order: list[str], length: int) -> None:
    planted = list(itertools.pairwise([*order[:length], order[0]]))
    wanted = [edge for edge in sorted(edges) if edge[::-1] not in planted and edge not in planted] + planted
    votes = [compare(f"user{i}", *edge) for i, edge in enumerate(wanted)]
    graph = nx.DiGraph(wanted)
    # Said another way than the code says it: an edge lies on a cycle where its worse end leads back to its better one.
    expected = [apart(Reason.CYCLE) if nx.has_path(graph, loser, winner) else ACCEPTED for winner, loser in wanted]
    assert decided(votes) == expected
    assert expected[-length:] == [apart(Reason.CYCLE)] * length
    kept = nx.DiGraph([edge for edge, one in zip(wanted, expected, strict=True) if one == ACCEPTED])
    assert nx.is_directed_acyclic_graph(kept)


@settings(deadline=None)
@given(some_votes())
def test_what_is_accepted_never_contradicts_itself(votes: list[Vote]) -> None:
    decisions = [one for one in curate(votes, RATERS) if one.state is State.ACCEPTED]
    assert nx.is_directed_acyclic_graph(nx.DiGraph([(one.chosen, one.rejected) for one in decisions]))
    assert all(0 < one.weight <= 1 and one.chosen != one.rejected for one in decisions)


def test_duplicates_of_a_prompt_share_what_is_said_of_the_same_texts() -> None:
    here = compare("ann", "x", "y")
    other = [replace(response(name), generation_id=f"{name}, again") for name in "xy"]
    there = replace(compare("bob", "y", "x"), prompt_id="its duplicate", a=other[1], b=other[0])
    assert hashlib.sha256(b"x").digest() == other[0].sha256
    assert decided([here, there]) == [apart(Reason.CONTESTED)] * 2


def test_the_page_on_curation_lists_every_reason_and_every_setting() -> None:
    page = (Path(__file__).parents[5] / "docs" / "curation.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    reasons = {code.strip("`"): text for code, _, text in cells[: len(Reason)]}
    said = {name.strip("`"): default.replace(",", "") for name, default, _ in cells[len(Reason) :]}
    defaults = {
        name: default == "yes" if default in ("yes", "no") else float(default) for name, default in said.items()
    }
    assert reasons == {reason.value: reason.explanation for reason in Reason}
    assert defaults == {name: field.default for name, field in CurationSettings.model_fields.items()}
