"""Ids of all that was ever learnt, in files that are written once: a checkpoint shares them with the one before.

    learnt/000000000000-4096.txt    4,096 ids, one a line, from the first on
    learnt/000000004096-512.txt     the 512 after those

As digits carry in a binary counter, a file is joined with those that come after once they are as many: of n ids there
are at most log₂ n files, and in months each is written log₂ n times at the most. A checkpoint has links to them, and is
whole without the folder that they are first written into.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from thumbwheel import files

FOLDER = "learnt"
OLDER = "learnt.txt"
"""The one file of all ids that older releases wrote, sorted."""


class _File(NamedTuple):
    name: str
    ids: int


class Learnt:
    """A set of ids. Its files are first written into the folder `home`, which nobody else writes into; without one it
    is not saved.
    """

    def __init__(self, home: Path | None = None) -> None:
        self._home = home
        self._ids: set[str] = set()
        self._files: list[_File] = []
        self._fresh: list[str] = []

    def __contains__(self, sample_id: object) -> bool:
        """True for what was learnt."""
        return sample_id in self._ids

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ids)

    def update(self, sample_ids: Iterable[str]) -> None:
        """Takes in ids; those that are there already change nothing."""
        for sample_id in sample_ids:
            if sample_id not in self._ids:
                self._ids.add(sample_id)
                self._fresh.append(sample_id)

    def save(self, folder: Path) -> None:
        """Makes the files of all ids in `folder`. Where that fails nothing has changed."""
        home, parts, fresh = self._home, list(self._files), self._fresh
        assert home is not None, "to be saved, it needs a home"
        while parts and parts[-1].ids <= len(fresh):
            fresh = [*(home / parts.pop().name).read_text().split(), *fresh]
        home.mkdir(parents=True, exist_ok=True)
        if fresh:
            file = _File(f"{len(self._ids) - len(fresh):012d}-{len(fresh)}.txt", len(fresh))
            # Never into one that has the name: a checkpoint may have it, too.
            unfinished = home / "unfinished"
            unfinished.write_text("".join(f"{sample_id}\n" for sample_id in fresh))
            unfinished.replace(home / file.name)
            parts.append(file)
        target = folder / FOLDER
        target.mkdir()
        for name, _ in parts:
            files.link(home / name, target / name)
        self._files, self._fresh = parts, []
        for path in home.iterdir():
            if path.name not in {name for name, _ in parts}:
                path.unlink()

    @classmethod
    def load(cls, folder: Path, home: Path) -> Learnt:
        """Reads what `save`, or an older release, wrote. Raises OSError and ValueError where it is not all there."""
        learnt = cls(home)
        if (older := folder / OLDER).exists():
            learnt.update(older.read_text().split())
            return learnt
        shutil.rmtree(home, ignore_errors=True)  # a checkpoint after this one may have left other files there
        home.mkdir(parents=True)
        for path in sorted((folder / FOLDER).iterdir()):
            begin, count = (int(number) for number in path.stem.split("-"))
            learnt.update(path.read_text().split())
            if begin + count != len(learnt):
                raise ValueError(f"{path} does not have the {count} ids after the first {begin}")
            files.link(path, home / path.name)
            learnt._files.append(_File(path.name, count))
        learnt._fresh = []
        return learnt
