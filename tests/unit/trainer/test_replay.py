"""What was learnt is drawn again by the round alone, until it is retracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.trainer.samples import make_groups, make_samples
from thumbwheel import errors
from trainer.replay import REFERENCE, Replay


def test_draws_follow_from_the_round_and_survive_a_restart(tmp_path: Path) -> None:
    replay, samples = Replay(seed=1), make_samples(10)
    replay.learnt(samples)
    replay.learnt(make_groups(3))
    assert len(replay) == 10, "rollouts go stale"
    drawn = replay.draw(4, round_number=7)
    assert len({sample.id for sample in drawn}) == 4
    assert drawn != replay.draw(4, round_number=8)
    replay.save(tmp_path)
    assert Replay.load(tmp_path, seed=1).draw(4, round_number=7) == drawn
    assert len(replay.draw(99, round_number=1)) == 10
    assert len(Replay.load(tmp_path / "none", seed=1)) == 0


def test_what_is_retracted_is_not_drawn_and_the_oldest_go_first() -> None:
    replay, samples = Replay(seed=0, kept=3), make_samples(5)
    replay.learnt(samples)
    replay.retract(samples[4].id)
    replay.retract("unknown")
    assert {sample.id for sample in replay.draw(9, 1)} == {samples[2].id, samples[3].id}


def test_what_the_reference_says_is_kept_to_the_bit_as_long_as_the_sample(tmp_path: Path) -> None:
    replay, samples = Replay(seed=0, kept=3), make_samples(5)
    whole = torch.randn(50, generator=torch.Generator().manual_seed(0))
    said = {sample.id: whole[10 * n : 10 * n + 10] for n, sample in enumerate(samples)}
    replay.learnt(samples[:4], said | {"a companion": whole})
    replay.learnt(samples[4:])  # of which nothing is known
    replay.retract(samples[3].id)
    ids = [*(sample.id for sample in samples), "a companion"]
    replay.save(tmp_path)
    for each in (replay, Replay.load(tmp_path, seed=0, kept=3)):
        [(name, found)] = each.reference(ids).items()
        assert (name, found.tolist()) == (samples[2].id, said[samples[2].id].tolist())
    (tmp_path / REFERENCE).write_bytes(b"torn")
    with pytest.raises(errors.CorruptCheckpoint, match="cannot be read"):
        Replay.load(tmp_path, seed=0)
