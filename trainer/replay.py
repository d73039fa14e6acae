"""What was learnt and may be learnt again, beside what is new. Rollouts are not: they go stale."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from thumbwheel import errors
from trainer import samples
from trainer.samples import Group, Sample

REPLAY = "replay.jsonl"

MOST = 4096
"""Samples that are kept: the newest."""


class Replay:
    """Samples that were learnt, oldest first. With `kept` 0 it keeps nothing."""

    def __init__(self, seed: int, kept: int = MOST) -> None:
        self._seed, self._kept = seed, kept
        self._samples: dict[str, Sample] = {}

    def __len__(self) -> int:
        """Samples that could be drawn."""
        return len(self._samples)

    def learnt(self, new: Iterable[Sample]) -> None:
        """Keeps samples that were learnt for the first time."""
        for sample in new:
            if self._kept and not isinstance(sample, Group):
                self._samples[sample.id] = sample
        for sample_id in list(self._samples)[: max(0, len(self._samples) - self._kept)]:
            del self._samples[sample_id]

    def retract(self, sample_id: str) -> None:
        """Forgets a sample."""
        self._samples.pop(sample_id, None)

    def draw(self, count: int, round_number: int) -> list[Sample]:
        """Up to `count` samples, each once; the same for the same round of the same samples."""
        rng = random.Random(f"{self._seed}/{round_number}/replay")
        return rng.sample(list(self._samples.values()), min(count, len(self._samples)))

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        with (folder / REPLAY).open("w") as file:
            for sample in self._samples.values():
                file.write(json.dumps(samples.to_fields(sample), separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, folder: Path, seed: int, kept: int = MOST) -> Replay:
        """Reads what `save` wrote; nothing where an older checkpoint has none. Raises `errors.CorruptCheckpoint`."""
        replay, path = cls(seed, kept), folder / REPLAY
        if not path.exists():
            return replay
        try:
            replay.learnt(samples.from_fields(json.loads(line)) for line in path.read_text().splitlines())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise errors.CorruptCheckpoint(
                f"{path} cannot be read: {error}.", remedy="Was it written by another release?"
            ) from error
        return replay
