"""What is kept of the pairs that came by."""

from __future__ import annotations

import random
from pathlib import Path

from tests.unit.trainer.samples import make_sample, make_thumbs
from trainer.reward.memory import Memory
from trainer.samples import Pair


def some(count: int, seed: int) -> list[Pair]:
    rng = random.Random(seed)
    return [make_sample(rng) for _ in range(count)]


def test_what_is_held_out_follows_from_the_prompt() -> None:
    pairs, thumbs = some(1000, 0), make_thumbs(3)
    learnt, heldout = Memory(share=0.2, capacity=10, seed=0).divide([*pairs, *thumbs])
    assert 150 < len(heldout) < 250
    assert Memory(share=0.2, capacity=10, seed=7).divide(list(reversed(pairs)))[1] == list(reversed(heldout))
    assert set(learnt) == {*pairs, *thumbs} - set(heldout)


def test_every_pair_has_the_same_chance_to_be_replayed() -> None:
    early, late = 0, 0
    for seed in range(40):
        memory = Memory(share=0.0, capacity=20, seed=seed)
        rounds = [some(20, number) for number in range(5)]
        for number, pairs in enumerate(rounds, 1):
            memory.keep(pairs, [], round_number=number)
        kept = memory.replay(100, round_number=6)
        assert len(kept) == 20
        early += len(set(kept) & set(rounds[0]))
        late += len(set(kept) & set(rounds[4]))
    # Of 800 places each round has 160, give or take three standard deviations.
    assert 125 < early < 195
    assert 125 < late < 195


def test_a_round_that_is_run_again_replays_the_same(tmp_path: Path) -> None:
    memory = Memory(share=0.0, capacity=50, seed=0)
    held = some(3, 9)
    memory.keep(some(30, 1), held, round_number=1)
    memory.save(tmp_path)
    again = Memory(share=0.0, capacity=50, seed=0)
    again.load(tmp_path)
    assert again.replay(8, round_number=2) == memory.replay(8, round_number=2)
    assert again.replay(8, round_number=2) != memory.replay(8, round_number=3)
    assert list(again.heldout.values()) == held


def test_what_is_retracted_is_dropped() -> None:
    memory, pairs, held = Memory(share=0.0, capacity=50, seed=0), some(4, 1), some(2, 2)
    memory.keep(pairs, held, round_number=1)
    memory.forget([pairs[0].id, held[1].id])
    assert {pair.id for pair in memory.replay(9, round_number=2)} == {pair.id for pair in pairs[1:]}
    assert list(memory.heldout) == [held[0].id]


def test_only_the_newest_are_held_out() -> None:
    memory, held = Memory(share=1.0, capacity=3, seed=0), some(5, 1)
    memory.keep([], held, round_number=1)
    assert list(memory.heldout.values()) == held[2:]
