"""What was learnt and may be learnt again, beside what is new. Rollouts are not: they go stale."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thumbwheel import errors
from trainer import samples
from trainer.samples import Group, Sample

REPLAY = "replay.jsonl"
REFERENCE = "replay-reference.safetensors"

MOST = 4096
"""Samples that are kept: the newest."""


class Replay:
    """Samples that were learnt, oldest first, with what the reference says of them. With `kept` 0 it keeps nothing."""

    def __init__(self, seed: int, kept: int = MOST) -> None:
        self._seed, self._kept = seed, kept
        self._samples: dict[str, Sample] = {}
        self._reference: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Samples that could be drawn."""
        return len(self._samples)

    def learnt(self, new: Iterable[Sample], reference: Mapping[str, Tensor] | None = None) -> None:
        """Keeps samples that were learnt, and of them the `reference` log-probabilities, [T] of each by its id."""
        for sample in new:
            if self._kept and not isinstance(sample, Group):
                self._samples[sample.id] = sample
                if reference is not None and sample.id in reference:
                    self._reference[sample.id] = reference[sample.id].clone()  # a part of something larger
        for sample_id in list(self._samples)[: max(0, len(self._samples) - self._kept)]:
            self.retract(sample_id)

    def retract(self, sample_id: str) -> None:
        """Forgets a sample."""
        self._samples.pop(sample_id, None)
        self._reference.pop(sample_id, None)

    def reference(self, sample_ids: Iterable[str]) -> dict[str, Tensor]:
        """The reference log-probabilities that are known of these samples: to the bit what was learnt with."""
        return {id: self._reference[id] for id in sample_ids if id in self._reference}

    def draw(self, count: int, round_number: int) -> list[Sample]:
        """Up to `count` samples, each once; the same for the same round of the same samples."""
        rng = random.Random(f"{self._seed}/{round_number}/replay")
        return rng.sample(list(self._samples.values()), min(count, len(self._samples)))

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        with (folder / REPLAY).open("w") as file:
            for sample in self._samples.values():
                file.write(json.dumps(samples.to_fields(sample), separators=(",", ":")) + "\n")
        if self._reference:
            save_file(self._reference, folder / REFERENCE)

    @classmethod
    def load(cls, folder: Path, seed: int, kept: int = MOST) -> Replay:
        """Reads what `save` wrote; nothing where an older checkpoint has none. Raises `errors.CorruptCheckpoint`."""
        replay, path = cls(seed, kept), folder / REPLAY
        if not path.exists():
            return replay
        try:
            reference = load_file(folder / REFERENCE) if (folder / REFERENCE).exists() else None
            read = (samples.from_fields(json.loads(line)) for line in path.read_text().splitlines())
            replay.learnt(read, reference)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise errors.CorruptCheckpoint(
                f"{path}, or {REFERENCE} beside it, cannot be read: {error}.",
                remedy="Was it written by another release?",
            ) from error
        return replay
