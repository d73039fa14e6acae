"""What a reward model's task keeps of the pairs that came by: some to learn from again, some never to learn from.

    of every ten prompts, the pairs of nine ──▶ learnt ──▶ a sample of all so far ──▶ mixed into later rounds
                          the pairs of one  ──▶ held out, the newest: what it is judged on after every round

Which prompts are held out follows from their tokens, so it is the same after every restart. What was learnt is kept by
reservoir sampling (Vitter, 1985), in which each pair has the same chance. What is retracted is dropped from both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from thumbwheel import errors
from trainer import samples
from trainer.reward.pairs import held_out
from trainer.samples import Pair, Sample

REPLAY, HELDOUT = "replay.jsonl", "heldout.jsonl"


class Memory:
    """Pairs learnt and pairs held out (those of a `share` of the prompts); at most `capacity` of each are kept."""

    def __init__(self, *, share: float, capacity: int, seed: int) -> None:
        self._share, self._capacity, self._seed = share, capacity, seed
        self.heldout: dict[str, Pair] = {}
        """The newest pairs held out, oldest first."""
        self._replay: list[Pair] = []
        self._seen = 0

    def divide(self, arrived: Sequence[Sample]) -> tuple[list[Sample], list[Pair]]:
        """Those to learn from, and those to hold out."""
        parts: tuple[list[Sample], list[Pair]] = [], []
        for sample in arrived:
            if isinstance(sample, Pair) and not sample.tie and held_out(sample, self._share):
                parts[1].append(sample)
            else:
                parts[0].append(sample)
        return parts

    def replay(self, count: int, *, round_number: int) -> list[Pair]:
        """So many pairs of earlier rounds, or all where they are fewer; a round that is run again gets the same."""
        chosen = random.Random(f"{self._seed}/replay/{round_number}")
        return chosen.sample(self._replay, min(count, len(self._replay)))

    def keep(self, learnt: Iterable[Sample], heldout: Iterable[Pair], *, round_number: int) -> None:
        """Takes in what a round learnt from for the first time, and what it held out."""
        chosen = random.Random(f"{self._seed}/keep/{round_number}")
        for sample in learnt:
            if not isinstance(sample, Pair):
                continue
            self._seen += 1
            if len(self._replay) < self._capacity:
                self._replay.append(sample)
            elif (place := chosen.randrange(self._seen)) < self._capacity:
                self._replay[place] = sample
        self.heldout |= {pair.id: pair for pair in heldout}
        for oldest in list(self.heldout)[: len(self.heldout) - self._capacity]:
            del self.heldout[oldest]

    def forget(self, sample_ids: Iterable[str]) -> None:
        """Drops what was retracted."""
        gone = set(sample_ids)
        self._replay = [pair for pair in self._replay if pair.id not in gone]
        self.heldout = {name: pair for name, pair in self.heldout.items() if name not in gone}

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        _write(folder / REPLAY, self._replay, {"seen": self._seen})
        _write(folder / HELDOUT, self.heldout.values(), {})

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; nothing where an older release wrote none. Raises `errors.CorruptCheckpoint`."""
        if not (folder / REPLAY).exists():
            return
        self._replay, about = _read(folder / REPLAY)
        self._seen = int(about["seen"])
        self.heldout = {pair.id: pair for pair in _read(folder / HELDOUT)[0]}


def newest_heldout(home: Path) -> list[Pair]:
    """What the trainer of a deployment holds out, as of its newest training checkpoint. Raises `errors.NotFound`."""
    from trainer.checkpoint import TrainingCheckpoints

    folder = TrainingCheckpoints(home / "trainer" / "reward", keep=1).newest()
    if folder is None or not (folder / HELDOUT).exists():
        raise errors.NotFound(
            f"The trainer in {home} holds no pairs out yet.", remedy="Name a file of pairs by --data."
        )
    return _read(folder / HELDOUT)[0]


def _write(path: Path, pairs: Iterable[Pair], about: dict[str, int]) -> None:
    with path.open("w") as file:
        file.write(json.dumps(about) + "\n")
        file.writelines(json.dumps(samples.to_fields(pair), separators=(",", ":")) + "\n" for pair in pairs)


def _read(path: Path) -> tuple[list[Pair], dict[str, int]]:
    try:
        first, *rest = path.read_text().splitlines()
        found = [sample for line in rest if isinstance(sample := samples.from_fields(json.loads(line)), Pair)]
        return found, json.loads(first)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.CorruptCheckpoint(
            f"{path} cannot be read: {error}.", remedy="Was it written by another release?"
        ) from error
