"""Thumbs of opposite sign, paired into comparisons."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.collector.curation import CurationSettings, Decision, Rater, RaterId, Raters, Reason, State, Vote, curate
from tests.unit.services.collector.curation.voting import compare, response, thumb

EQUAL = Raters.none(CurationSettings())


def unpaired(vote: Vote, weight: float = 1.0) -> Decision:
    return Decision(vote.feedback_id, State.RECORDED, Reason.UNPAIRED_THUMB, weight)


def paired(up: Vote, down: Vote, weight: float = 1.0) -> list[Decision]:
    both = State.ACCEPTED, Reason.PAIRED_THUMBS, weight, up.a.generation_id, down.a.generation_id
    return [
        Decision(up.feedback_id, *both, down.feedback_id, emits=True),
        Decision(down.feedback_id, *both, up.feedback_id, emits=False),
    ]


def test_a_thumb_by_itself_stays_unpaired() -> None:
    up = thumb("ann", "x", up=True)
    assert curate([up], EQUAL) == [unpaired(up)]


def test_thumbs_of_equal_sign_are_not_paired() -> None:
    votes = [thumb("ann", "x", up=False), thumb("ann", "y", up=False)]
    assert curate(votes, EQUAL) == [unpaired(vote) for vote in votes]


def test_a_raters_own_thumbs_are_paired_before_those_of_others() -> None:
    up, down = thumb("zoe", "x", up=True), thumb("zoe", "y", up=False)
    others = thumb("ann", "w", up=True)
    assert curate([others, down, up], EQUAL) == [*paired(up, down), unpaired(others)]


def test_thumbs_of_different_raters_are_paired_with_the_lesser_weight() -> None:
    up, down = thumb("ann", "x", up=True), thumb("bob", "y", up=False)
    raters = Raters(EQUAL.newcomer, {RaterId("acme", "bob"): Rater(0.6, 0.4)})
    assert curate([up, down], raters) == paired(up, down, weight=0.4)


def test_thumbs_on_one_text_or_on_different_prompts_are_not_paired() -> None:
    up = thumb("ann", "x", up=True)
    same_text = replace(thumb("bob", "x", up=False), a=replace(response("x"), generation_id="x, again"))
    other_prompt = thumb("bob", "y", up=False, prompt_sha256=b"another")
    assert curate([up, same_text, other_prompt], EQUAL) == [unpaired(vote) for vote in (up, same_text, other_prompt)]


def test_whoever_has_compared_two_is_not_heard_twice() -> None:
    vote = compare("ann", "x", "y")
    up, down = thumb("ann", "x", up=True), thumb("ann", "y", up=False)
    accepted = Decision(vote.feedback_id, State.ACCEPTED, Reason.PREFERRED, 1.0, "x", "y", "", emits=True)
    assert curate([vote, up, down], EQUAL) == [accepted, unpaired(up), unpaired(down)]


def test_the_last_thumb_counts() -> None:
    up, down = thumb("ann", "x", up=True), thumb("ann", "x", up=False)
    other = thumb("ann", "y", up=True)
    superseded = Decision(up.feedback_id, State.APART, Reason.SUPERSEDED)
    assert curate([up, down, other], EQUAL) == sorted(
        [superseded, *paired(other, down)], key=lambda one: one.feedback_id
    )


def test_paired_thumbs_take_part_in_cycles() -> None:
    up, down = thumb("ann", "z", up=True), thumb("ann", "x", up=False)
    votes = [compare("bob", "x", "y"), compare("cid", "y", "z"), up, down]
    assert [one.reason for one in curate(votes, EQUAL)] == [Reason.CYCLE] * 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz"), st.booleans()), max_size=30))
def test_each_thumb_is_used_once_and_as_many_as_possible_of_one_rater(thumbs: list[tuple[str, str, bool]]) -> None:
    votes = [thumb(user, name, up=up) for user, name, up in thumbs]
    decisions = {one.feedback_id: one for one in curate(votes, EQUAL)}
    by_id = {vote.feedback_id: vote for vote in votes}
    for one in decisions.values():
        if one.partner:
            assert decisions[one.partner].partner == one.feedback_id
            assert decisions[one.partner].emits is not one.emits
            assert by_id[one.partner].choice != by_id[one.feedback_id].choice
    if len({user for user, _, _ in thumbs}) == 1:
        last = {name: up for _, name, up in thumbs}
        ups = sum(last.values())
        emitted = sum(one.emits for one in decisions.values())
        cycles_or_nets = sum(one.reason in (Reason.CYCLE, Reason.CONTESTED) for one in decisions.values())
        assert (emitted, cycles_or_nets) == (min(ups, len(last) - ups), 0)
