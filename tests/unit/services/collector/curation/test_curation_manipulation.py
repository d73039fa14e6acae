"""What accounts that push one version achieve, with curation and without, in a simulated population."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from services.collector.curation import (
    CurationSettings,
    RaterId,
    Raters,
    Reason,
    Result,
    State,
    Vote,
    assess,
    curate_all,
)
from tests.unit.services.collector.curation.population import World, accepted_win_rate, ranked, win_rate

PEOPLE = 400
PUPPETS = 21  # Five in a hundred of all accounts.

REFUSED = {reason for reason in Reason if reason.startswith(("quarantined", "over"))}


def settled(votes: Iterable[Vote]) -> tuple[list[Vote], Result]:
    by_time = ranked(votes)
    return by_time, curate_all(by_time)


def shifts(honest: list[Vote], attack: list[Vote]) -> tuple[float, float, float]:
    """Points by which the attack moves the target's win rate, undefended and defended; percent of honest votes lost.

    Lost is what is refused, and what was accepted without the attack and is no longer.
    """
    before_votes, before = settled(honest)
    after_votes, after = settled([*honest, *attack])
    undefended = win_rate([*honest, *attack]) - win_rate(honest)
    defended = accepted_win_rate(after_votes, after.decisions) - accepted_win_rate(before_votes, before.decisions)
    of_people = {vote.feedback_id for vote in honest}
    accepted = {one.feedback_id for one in before.decisions if one.state is State.ACCEPTED}
    lost = [
        one
        for one in after.decisions
        if one.feedback_id in of_people
        and (one.reason in REFUSED or (one.feedback_id in accepted and one.state is not State.ACCEPTED))
    ]
    return undefended, defended, 100.0 * len(lost) / len(honest)


@pytest.mark.parametrize("seed", range(3))
def test_colluders_and_a_flooder_together_achieve_nothing(seed: int) -> None:
    world = World(seed)
    honest = world.honest(PEOPLE)
    undefended, defended, lost = shifts(honest, world.colluders(PUPPETS, 150) + world.flooder(10_000))
    print(f"undefended {undefended:+.1f}, defended {defended:+.2f} points; honest votes lost {lost:.3f} %")
    assert undefended >= 20
    assert abs(defended) <= 1
    assert lost <= 0.5


def test_colluders_who_are_sometimes_honest_and_push_down_achieve_nothing() -> None:
    world = World(3)
    honest = world.honest(PEOPLE)
    undefended, defended, lost = shifts(honest, world.colluders(PUPPETS, 150, wins=False, effort=0.9))
    assert undefended <= -20
    assert abs(defended) <= 1
    assert lost <= 0.5


@pytest.mark.parametrize("days", [1, 20])
def test_one_account_with_ten_thousand_votes_achieves_nothing(days: int) -> None:
    world = World(4)
    honest = world.honest(PEOPLE)
    undefended, defended, lost = shifts(honest, world.flooder(10_000, days))
    assert undefended >= 20
    assert abs(defended) <= 1
    assert lost <= 0.5


def test_people_of_strong_tastes_are_not_taken_for_colluders() -> None:
    world = World(5)
    raters = assess((vote.prompt_id, vote) for vote in world.honest(PEOPLE, taste=0.6))
    assert [one for one in raters if raters[one].quarantine] == []
    assert [one for one in raters if raters[one].bursts] == []


def test_one_person_who_always_likes_one_version_does_not_collude() -> None:
    world = World(6)
    raters = assess((vote.prompt_id, vote) for vote in world.honest(PEOPLE) + world.colluders(1, 150))
    assert raters[RaterId("acme", "puppet000")].quarantine is not Reason.QUARANTINED_COLLUSION


def test_a_group_is_no_smaller_than_set() -> None:
    world = World(8)
    votes = [(vote.prompt_id, vote) for vote in world.honest(60) + world.colluders(2, 60)]
    easily = CurationSettings(group_chance=0.5, collusion_accounts=3)
    assert colluding(assess(votes, easily)) == set()
    assert colluding(assess(votes, easily.model_copy(update={"collusion_accounts": 2}))) == {"puppet000", "puppet001"}


def test_as_many_one_sided_accounts_as_chance_gives_are_no_group() -> None:
    votes = [(vote.prompt_id, vote) for vote in World(9).honest(100)]
    assert colluding(assess(votes, CurationSettings(account_chance=0.2))) == set()


def colluding(raters: Raters) -> set[str]:
    return {one.user_id for one in raters if raters[one].quarantine is Reason.QUARANTINED_COLLUSION}


def test_accounts_in_lockstep_are_found_where_no_version_is_known() -> None:
    """They dissent together from all others who judged the same pairs."""
    world = World(7, prompts=100)
    votes = world.without_versions(world.honest(PEOPLE) + world.colluders(4, 60))
    raters = assess(((vote.prompt_id, vote) for vote in votes), CurationSettings(min_judged=1_000))
    caught = {one.user_id for one in raters if raters[one].quarantine}
    assert caught == {f"puppet{i:03}" for i in range(4)}
    assert {raters[RaterId("acme", user)].quarantine for user in caught} == {Reason.QUARANTINED_COLLUSION}
