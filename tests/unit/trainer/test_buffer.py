"""Whatever comes in, in whatever order, however often: each sample is learnt once, and never after its retraction."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.samples import make_sample, make_samples
from thumbwheel import errors
from trainer.buffer import Buffer

SAMPLES = make_samples(6)
ids = st.integers(0, len(SAMPLES) - 1)
events = st.one_of(
    st.tuples(st.just("accept"), ids),
    st.tuples(st.just("retract"), ids),
    st.tuples(st.just("round"), st.integers(1, 4)),
    st.tuples(st.just("restart"), st.just(0)),
)


@given(history=st.lists(events, max_size=60))
def test_every_sample_is_learnt_at_most_once_and_what_was_accepted_first_is_learnt(
    history: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    buffer = Buffer(home)
    learnt: list[str] = []
    accepted: list[str] = []  # not retracted before
    retracted: set[str] = set()
    for number, (what, argument) in enumerate(history):
        sample = SAMPLES[argument % len(SAMPLES)]
        if what == "accept":
            added = buffer.add(sample, number)
            assert added == (sample.id not in accepted and sample.id not in retracted)
            if added:
                accepted.append(sample.id)
        elif what == "retract":
            assert buffer.retract(sample.id) == (sample.id in learnt and sample.id not in retracted)
            retracted.add(sample.id)
        elif what == "round":
            taken = buffer.oldest(argument)
            assert not retracted & {s.id for s in taken}
            buffer.learnt(s.id for s in taken)
            learnt += [s.id for s in taken]
        else:
            folder = tmp_path_factory.mktemp("buffer")
            buffer.save(folder)
            buffer = Buffer.load(folder, number, home)
    while rest := buffer.oldest(3):
        buffer.learnt(s.id for s in rest)
        learnt += [s.id for s in rest]
    assert len(learnt) == len(set(learnt))
    assert set(accepted) - retracted <= set(learnt) <= set(accepted)


def test_what_is_accepted_again_is_learnt_once(tmp_path: Path) -> None:
    waits, done = SAMPLES[:2]
    buffer = Buffer(tmp_path / "home")
    for sample in (waits, done):
        buffer.add(sample, 0.0)
    buffer.learnt([done.id])
    assert [buffer.retract(sample.id, 2) for sample in (waits, done)] == [False, True]
    assert [buffer.restore(sample.id, 1) for sample in (waits, done)] == [False, False], "said before the retraction"
    assert not buffer.add(waits, 1.0)
    buffer.save(tmp_path)
    buffer = Buffer.load(tmp_path, 2.0, tmp_path / "home")
    assert [buffer.restore(sample.id, 3) for sample in (waits, done)] == [True, True]
    assert [buffer.add(sample, 3.0) for sample in (waits, done)] == [True, False]
    assert buffer.reweigh(waits.id, 0.25)
    assert not buffer.reweigh(waits.id, 0.25)
    assert not buffer.reweigh(done.id, 0.25)
    assert [(sample.id, sample.weight) for sample in buffer.oldest(9)] == [(waits.id, 0.25)]
    (tmp_path / "next").mkdir()
    buffer.save(tmp_path / "next")
    buffer = Buffer.load(tmp_path / "next", 4.0, tmp_path / "home")
    assert not buffer.retract(done.id, 2), "all is published again: this was said before"
    assert not buffer.retract(waits.id, 2)
    assert len(buffer) == 1
    assert buffer.retract(done.id, 4)


def test_a_buffer_of_an_older_release_is_read(tmp_path: Path) -> None:
    buffer = Buffer(tmp_path / "home")
    buffer.save(tmp_path)
    (tmp_path / "retracted.txt").write_text(f"{SAMPLES[0].id}\n")
    assert not Buffer.load(tmp_path, 0.0, tmp_path / "home").add(SAMPLES[0], 0.0)


def test_a_round_is_due_when_full_or_when_enough_have_waited() -> None:
    buffer, samples = Buffer(), make_samples(4)

    def due(now: float) -> bool:
        return buffer.due(now, round_size=4, min_round_size=2, max_wait=10.0)

    buffer.add(samples[0], 0.0)
    assert not due(1000.0)
    buffer.add(samples[1], 5.0)
    assert not due(9.9)
    assert due(10.0)
    buffer.add(samples[2], 6.0)
    buffer.add(samples[3], 7.0)
    assert due(7.0)
    buffer.learnt([samples[0].id])
    assert not due(14.9)
    assert due(15.0)


def test_the_oldest_come_first_and_stay_until_learnt() -> None:
    buffer, samples = Buffer(), make_samples(3)
    for number, sample in enumerate(samples):
        buffer.add(sample, float(number))
    assert buffer.oldest(2) == samples[:2]
    assert buffer.oldest(2) == samples[:2]
    buffer.learnt([samples[0].id])
    assert buffer.oldest(5) == samples[1:]
    assert len(buffer) == 2


def test_a_restart_keeps_samples_whole(tmp_path: Path) -> None:
    buffer = Buffer(tmp_path / "home")
    sample = make_sample(random.Random(1), weight=0.25)
    buffer.add(sample, 1.0)
    buffer.save(tmp_path)
    loaded = Buffer.load(tmp_path, 100.0, tmp_path / "home")
    assert loaded.oldest(1) == [sample]
    assert not loaded.due(100.5, round_size=2, min_round_size=1, max_wait=1.0)
    assert loaded.due(101.0, round_size=2, min_round_size=1, max_wait=1.0)


def test_a_buffer_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    Buffer(tmp_path / "home").save(tmp_path)
    (tmp_path / "pending.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(errors.CorruptCheckpoint, match="buffer cannot be read"):
        Buffer.load(tmp_path, 0.0, tmp_path / "home")
