"""What has come in and is not learnt yet, and the ids of all that ever came in: nothing is learnt twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from thumbwheel import errors
from trainer import samples
from trainer.learnt import Learnt
from trainer.samples import Group, Sample

PENDING = "pending.jsonl"
RETRACTED = "retracted.txt"


class Buffer:
    """Samples that wait, oldest first, and the fate of every id seen; `home` as in `Learnt`."""

    def __init__(self, home: Path | None = None) -> None:
        self._pending: dict[str, Sample] = {}
        self._arrived: dict[str, float] = {}
        self._learnt = Learnt(home)
        self._retracted: set[str] = set()
        # Of what was taken back, or brought again: the number of what was last said. What has no higher one is stale.
        self._revisions: dict[str, int] = {}

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._pending)

    def __contains__(self, sample_id: str) -> bool:
        """True for an id that was ever seen: it waits, is learnt, or was retracted."""
        return sample_id in self._pending or sample_id in self._learnt or sample_id in self._retracted

    def restore(self, sample_id: str, revision: int) -> bool:
        """Lifts a retraction that is older than `revision`. True where there was one: what was not learnt may be added
        again, and what was learnt counts as learnt.
        """
        if sample_id not in self._retracted or revision <= self._revisions[sample_id]:
            return False
        self._retracted.remove(sample_id)
        self._revisions[sample_id] = revision
        return True

    def reweigh(self, sample_id: str, weight: float) -> bool:
        """Gives a sample that waits another weight. False where none waits, or it has that weight."""
        sample = self._pending.get(sample_id)
        if sample is None or sample.weight == weight:
            return False
        self._pending[sample_id] = dataclasses.replace(sample, weight=weight)
        return True

    def add(self, sample: Sample, now: float) -> bool:
        """Takes in a sample that arrived at `now` (any clock that only rises). False for one seen before."""
        if sample.id in self:
            return False
        self._pending[sample.id] = sample
        self._arrived[sample.id] = now
        return True

    def retract(self, sample_id: str, revision: int = 0) -> bool:
        """Forgets a sample that waits, and refuses it until it is accepted anew with a higher `revision`. True where it
        was learnt already (told once).
        """
        first = sample_id not in self._retracted
        if first and revision <= self._revisions.get(sample_id, -1):
            return False
        self._retracted.add(sample_id)
        self._revisions[sample_id] = max(revision, self._revisions.get(sample_id, 0))
        if self._pending.pop(sample_id, None) is not None:
            del self._arrived[sample_id]
        return first and sample_id in self._learnt

    def due(self, now: float, *, round_size: int, min_round_size: int, max_wait: float) -> bool:
        """True where a round is to start: enough samples wait, or fewer have waited for long enough."""
        if len(self._pending) >= round_size:
            return True
        return len(self._pending) >= min_round_size and now - min(self._arrived.values()) >= max_wait

    def oldest(self, count: int) -> list[Sample]:
        """The `count` samples that arrived first; they go on waiting until they are `learnt`."""
        return [sample for sample, _ in zip(self._pending.values(), range(count), strict=False)]

    def pick(self, sample_ids: Iterable[str]) -> list[Sample]:
        """Those samples that wait, in this order."""
        return [self._pending[sample_id] for sample_id in sample_ids if sample_id in self._pending]

    def drop(self, sample_ids: Iterable[str]) -> None:
        """Forgets samples that wait and are of no use any more."""
        for sample_id in sample_ids:
            del self._pending[sample_id], self._arrived[sample_id]

    def of_source(self, source: str) -> list[str]:
        """Ids of the rollouts that wait and were asked for because of a piece of feedback."""
        waiting = self._pending.items()
        return [id for id, sample in waiting if isinstance(sample, Group) and id.startswith(f"{source}/")]

    def learnt(self, sample_ids: Iterable[str]) -> None:
        """Marks samples as learnt."""
        sample_ids = list(sample_ids)
        self._learnt.update(sample_ids)
        for sample_id in sample_ids:
            if self._pending.pop(sample_id, None) is not None:
                del self._arrived[sample_id]

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        lines = (json.dumps(samples.to_fields(sample), separators=(",", ":")) for sample in self._pending.values())
        _write_lines(folder / PENDING, lines)
        self._learnt.save(folder)
        revisions = sorted(self._revisions.items())
        lines = (f"{id} {revision} {'retracted' if id in self._retracted else 'again'}" for id, revision in revisions)
        _write_lines(folder / RETRACTED, lines)

    @classmethod
    def load(cls, folder: Path, now: float, home: Path) -> Buffer:
        """Reads what `save` wrote; what waits counts as arrived at `now`. Raises `errors.CorruptCheckpoint`."""
        buffer = cls(home)
        try:
            for line in (folder / PENDING).read_text().splitlines():
                buffer.add(samples.from_fields(json.loads(line)), now)
            buffer._learnt = Learnt.load(folder, home)
            for line in (folder / RETRACTED).read_text().splitlines():
                sample_id, revision, state = line.split() if " " in line else (line, "0", "retracted")
                buffer._revisions[sample_id] = int(revision)
                if state == "retracted":
                    buffer._retracted.add(sample_id)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise errors.CorruptCheckpoint(
                f"{folder}: the buffer cannot be read: {error}.", remedy="Was it written by another release?"
            ) from error
        return buffer


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w") as file:
        file.writelines(line + "\n" for line in lines)
