"""How far each rater is relied on, and how much one may count."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.collector.curation import (
    Choice,
    CurationSettings,
    Overrides,
    RaterId,
    Raters,
    Reason,
    Vote,
    assess,
)
from tests.unit.services.collector.curation.voting import compare, thumb

DAY, MINUTE = 86_400_000_000, 60_000_000
SETTINGS = CurationSettings()


def snapshot(
    votes: Sequence[Vote], settings: CurationSettings = SETTINGS, overrides: Overrides | None = None
) -> Raters:
    return assess(((vote.prompt_id, vote) for vote in votes), settings, overrides)


def rater(user: str) -> RaterId:
    return RaterId("acme", user)


def panel(accuracies: dict[str, float], pairs: int, gold: int = 0, seed: int = 1) -> list[Vote]:
    """Everybody judges every pair, with these probabilities of being right; of the first pairs the answer is known."""
    chance = random.Random(seed)
    votes: list[Vote] = []
    for pair in range(pairs):
        better, worse = chance.sample([f"{pair}x", f"{pair}y"], 2)
        for user, accuracy in accuracies.items():
            right = chance.random() < accuracy
            vote = compare(user, *((better, worse) if right else (worse, better)), prompt_id=f"p{pair}")
            known = (Choice.A if right else Choice.B) if pair < gold else None
            votes.append(replace(vote, gold=known, received_at=len(votes) * MINUTE))
    return votes


def test_accuracy_is_found_without_knowing_the_truth() -> None:
    accuracies = {"ann": 0.95, "bob": 0.85, "cid": 0.75, "dan": 0.65, "eve": 0.5}
    found = snapshot(panel(accuracies, pairs=2_000))
    for user, accuracy in accuracies.items():
        assert found[rater(user)].reliability == pytest.approx(accuracy, abs=0.04)
        assert found[rater(user)].quarantine == (Reason.QUARANTINED_UNRELIABLE if user == "eve" else None)


def test_the_estimate_is_that_of_textbook_dawid_skene() -> None:
    """Held against plain one-coin EM over full posteriors, written for one item at a time."""
    votes = panel({"ann": 0.9, "bob": 0.8, "cid": 0.7, "dan": 0.6, "eve": 0.8}, pairs=1_500, seed=5)
    sides: dict[str, dict[str, int]] = {}
    for vote in votes:
        sides.setdefault(vote.prompt_id, {})[vote.rater.user_id] = 1 if vote.a.generation_id.endswith("x") else -1
    accuracy = dict.fromkeys(["ann", "bob", "cid", "dan", "eve"], 0.75)
    for _ in range(20):
        right = dict.fromkeys(accuracy, 0.0)
        for of_item in sides.values():
            x, y = (
                math.prod(accuracy[u] if s == side else 1 - accuracy[u] for u, s in of_item.items()) for side in (1, -1)
            )
            for user, side in of_item.items():
                right[user] += x / (x + y) if side == 1 else y / (x + y)
        accuracy = {user: total / len(sides) for user, total in right.items()}
    found = snapshot(votes)
    assert {user: found[rater(user)].reliability for user in accuracy} == pytest.approx(accuracy, abs=0.03)


def test_a_newcomer_weighs_as_much_as_anybody() -> None:
    found = snapshot(panel({"ann": 0.9, "bob": 0.9, "cid": 0.9}, pairs=50))
    assert found[rater("nobody knows")].weight == 1.0
    assert found[rater("ann")].weight == 1.0
    assert found[rater("nobody knows")].reliability == SETTINGS.prior_accuracy
    assert rater("nobody knows") not in list(found)


def test_who_cannot_be_judged_keeps_the_weight_of_a_newcomer() -> None:
    alone = [compare("ann", f"{i}x", f"{i}y", prompt_id=f"p{i}", received_at=i * MINUTE) for i in range(40)]
    known = snapshot(alone)[rater("ann")]
    assert (known.votes, known.judged, known.weight, known.reliability) == (40, 0.0, 1.0, 0.75)


def test_gold_finds_those_who_only_agree_with_each_other() -> None:
    honest = {f"person{i}": 0.85 for i in range(3)}
    votes = panel(honest, pairs=200, gold=30)
    # Three accounts outnumber nobody and agree with each other wherever nobody else votes.
    for i in range(300):
        for user in ("bot1", "bot2", "bot3"):
            votes.append(compare(user, f"z{i}", f"t{i}", prompt_id=f"q{i}", received_at=i * MINUTE))
    assert snapshot(votes)[rater("bot1")].quarantine is None
    for i in range(30):
        for user in ("bot1", "bot2", "bot3"):
            wrong = Choice.B if i % 3 else Choice.A
            votes.append(compare(user, f"g{i}", f"h{i}", prompt_id=f"g{i}", gold=wrong, received_at=i * MINUTE))
    found = snapshot(votes)
    assert found[rater("bot1")].quarantine is Reason.QUARANTINED_UNRELIABLE
    assert (found[rater("bot1")].gold_judged, found[rater("bot1")].gold_correct) == (30, 10)
    assert all(found[rater(user)].quarantine is None for user in honest)


def test_a_few_wrong_answers_are_forgiven() -> None:
    votes = panel({"ann": 0.9, "bob": 0.9, "cid": 0.2}, pairs=5)
    assert all(snapshot(votes)[one].quarantine is None for one in snapshot(votes))


def test_ties_and_superseded_votes_are_no_evidence() -> None:
    votes = panel({"ann": 0.9, "bob": 0.8, "cid": 0.7}, pairs=60)
    before = [
        replace(vote, choice=Choice.A if i % 2 else Choice.B, received_at=vote.received_at - 1, feedback_id=f"e{i}")
        for i, vote in enumerate(votes)
    ]
    ties = [replace(compare("dan", f"{i}x", f"{i}y", prompt_id=f"p{i}"), choice=Choice.TIE) for i in range(60)]
    found, plain = snapshot([*ties, *votes, *before]), snapshot(votes)
    assert [found[rater(user)].reliability for user in ("ann", "bob", "cid")] == [
        plain[rater(user)].reliability for user in ("ann", "bob", "cid")
    ]
    assert found[rater("dan")].votes == 0


def test_any_order_gives_the_same_snapshot() -> None:
    votes = panel({"ann": 0.9, "bob": 0.8, "cid": 0.7, "dan": 0.5}, pairs=80, gold=10)
    shuffled = random.Random(2).sample(votes, len(votes))
    assert repr(snapshot(shuffled)) == repr(snapshot(votes))


def test_no_votes_give_an_empty_snapshot() -> None:
    assert snapshot([]) == Raters.none(SETTINGS)


def test_a_user_weighs_at_most_a_few_times_the_median_user() -> None:
    votes = [
        compare(user, f"{user}{i}x", f"{user}{i}y", prompt_id=f"{user}{i}", received_at=i * MINUTE)
        for user, number in {"ann": 40, "bob": 40, "cid": 40, "dan": 600}.items()
        for i in range(number)
    ]
    found = snapshot(votes)
    assert found[rater("ann")].weight == 1.0
    assert found[rater("dan")].weight * 600 == pytest.approx(3 * 40, abs=0.1)
    other_tenant = [
        replace(vote, rater=RaterId("globex", vote.rater.user_id)) for vote in votes if "d" in vote.rater[1]
    ]
    assert snapshot([*votes, *other_tenant])[RaterId("globex", "dan")].weight == 1.0


def test_a_burst_is_quarantined_and_the_rest_is_not() -> None:
    slow = [thumb(user, f"{user}{i}", up=True, received_at=i * DAY) for user in ("ann", "bob") for i in range(30)]
    fast = [thumb("ann", f"fast{i}", up=True, received_at=40 * DAY + i * 1_000_000) for i in range(50)]
    found = snapshot([*slow, *fast])
    assert found[rater("ann")].bursts == ((40 * DAY, 40 * DAY + MINUTE),)
    assert found[rater("bob")].bursts == ()


def test_up_to_the_limit_nobody_is_too_fast() -> None:
    others = [thumb(user, f"{user}{i}", up=True, received_at=i * MINUTE) for user in ("bob", "cid") for i in range(3)]
    votes = [*others, *(thumb("ann", f"{i}", up=True, received_at=i) for i in range(SETTINGS.burst_votes_per_minute))]
    assert snapshot(votes)[rater("ann")].bursts == ()
    votes.append(thumb("ann", "one more", up=True, received_at=99))
    assert snapshot(votes)[rater("ann")].bursts == ((0, MINUTE),)


def test_where_everybody_is_fast_nobody_is_too_fast() -> None:
    votes = [
        thumb(user, f"{user}{i}", up=True, received_at=i * 2_000_000) for user in ("a", "b", "c") for i in range(90)
    ]
    assert [snapshot(votes)[rater(user)].bursts for user in ("a", "b", "c")] == [()] * 3


def test_a_day_that_no_person_could_give_is_a_burst() -> None:
    votes = [thumb("ann", f"{i}", up=True, received_at=5 * DAY + i * MINUTE) for i in range(1_001)]
    assert snapshot(votes)[rater("ann")].bursts == ((5 * DAY, 6 * DAY),)
    assert snapshot(votes[1:])[rater("ann")].bursts == ()


def test_whoever_is_quarantined_does_not_say_what_is_right() -> None:
    accuracies = {"ann": 0.9, "bob": 0.9, "bot1": 0.1, "bot2": 0.1, "bot3": 0.1}
    votes = panel(accuracies, pairs=100)
    held = Overrides(quarantined=frozenset({rater("bot1"), rater("bot2"), rater("bot3")}))
    assert snapshot(votes)[rater("ann")].reliability < 0.5
    assert snapshot(votes, overrides=held)[rater("ann")].reliability > 0.8
    released = replace(held, released=held.quarantined)
    assert snapshot(votes, overrides=released)[rater("ann")].reliability < 0.5
