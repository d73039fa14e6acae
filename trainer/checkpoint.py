"""Training checkpoints: everything a task is, in one folder that is there whole or not at all.

    root/checkpoint-000012/index.json     every other file with its size and SHA-256
    root/round-000013/index.json          what is being learnt, on top of checkpoint 12; small, and no weights
    root/.staging                         one being written

A folder appears by one rename, after its files are hashed and synced. It is the trainer's own and stays with it.
Nothing is read before its hash is checked.

A round is written down before it is learnt. After a crash it is learnt again from the very same samples, whatever has
come in meanwhile and in whatever order it is read: so the weights come out the same, bit for bit.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from thumbwheel import errors, files

logger = logging.getLogger(__name__)

INDEX = "index.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")
_ROUND = re.compile(r"round-(\d{6,})")
_REMEMBERED = 1_000
"""Files whose hashes are known."""
_STAGING, _ROUND_STAGING = ".staging", ".staging-round"


class TrainingCheckpoints:
    """The checkpoints of one task in `root`, of which the newest `keep` are kept."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self._root = root
        self._keep = keep
        self._hashed: dict[tuple[int, ...], str] = {}

    def write(self, number: int, fill: Callable[[Path], None]) -> Path:
        """Makes checkpoint `number` of what `fill` writes into a folder. One that has that number is replaced: only a
        corrupt one can be there. Raises `errors.NoSpace`; then nothing has changed.
        """
        return self.finish(number, self.stage(number, fill))

    def stage(self, number: int, fill: Callable[[Path], None]) -> Path:
        """The first half of `write`: the folder that `fill` has written into, and that more may be written into."""
        return self._stage(_STAGING, self._root / f"checkpoint-{number:06d}", fill)

    def target(self, number: int) -> Path:
        """Where checkpoint `number` is, once it is there."""
        return self._root / f"checkpoint-{number:06d}"

    def finish(self, number: int, staging: Path, more: Callable[[], None] = lambda: None) -> Path:
        """The second half: when `more` has written the rest, the folder is hashed, synced and renamed. Old checkpoints
        go, and rounds that none of those that stay needs.
        """
        target = self._put(staging, self.target(number), more)
        newest_first = sorted(self._numbered(_NAME), reverse=True)
        kept, old = newest_first[: self._keep], newest_first[self._keep :]
        for _, folder in [*old, *((n, folder) for n, folder in self._numbered(_ROUND) if n <= kept[-1][0])]:
            shutil.rmtree(folder)
        return target

    def write_round(self, number: int, fill: Callable[[Path], None]) -> Path:
        """Writes down what round `number` learns, as `write` does. Raises `errors.NoSpace`."""
        target = self._root / f"round-{number:06d}"
        return self._put(self._stage(_ROUND_STAGING, target, fill), target)

    def round(self, number: int) -> Path | None:
        """What round `number` learns, where that was written down; one that does not verify is passed over."""
        folder = self._root / f"round-{number:06d}"
        if not folder.exists():
            return None
        if fault := _fault(folder):
            logger.error("what a round learns is read from the stream again: %s", fault)
            return None
        return folder

    def add(self, number: int, staging: Path, fill: Callable[[Path], None]) -> None:
        """More of what `stage` has begun, at once. Raises `errors.NoSpace`."""
        with files.space_errors(self._root, files.tree_size(staging), _what(self.target(number))):
            fill(staging)

    def _stage(self, name: str, target: Path, fill: Callable[[Path], None]) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        staging = self._root / name
        newest = max(self._numbered(_NAME), default=None)
        needed = files.tree_size(newest[1]) if newest and target.name.startswith("checkpoint") else 0
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with files.space_errors(self._root, needed, _what(target)):
                files.require_space(self._root, needed, _what(target))
                staging.mkdir()
                fill(staging)  # 1
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging

    def _put(self, staging: Path, target: Path, more: Callable[[], None] = lambda: None) -> Path:
        needed = files.tree_size(staging)
        try:
            with files.space_errors(self._root, needed, _what(target)):
                more()
                index = {"format": _FORMAT, "files": self._describe(staging)}  # 2
                (staging / INDEX).write_text(json.dumps(index, indent=1))
                files.sync_tree(staging)  # 3
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)  # 4
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        files.sync(self._root)
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None where there is none at all.

        One that does not verify is passed over with an error in the log. Raises `errors.CorruptCheckpoint` where there
        are some and none verifies: beginning anew would learn everything twice.
        """
        faults = []
        for _, folder in sorted(self._numbered(_NAME), reverse=True):
            if fault := _fault(folder):
                faults.append(fault)
                logger.error("training checkpoint passed over: %s", fault)
            else:
                return folder
        if faults:
            raise errors.CorruptCheckpoint(
                f"No training checkpoint in {self._root} is whole: {faults[0]}",
                remedy="Restore one from a copy. To go on from the newest published version instead, with a fresh "
                "optimizer, move the folder away.",
            )
        return None

    def _describe(self, folder: Path) -> dict[str, dict[str, int | str]]:
        """Files that are shared with the checkpoint before are hashed once, and those never that come with a digest."""
        found = dict[str, dict[str, int | str]]()
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name == INDEX:
                continue
            stat = path.stat()
            same = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            told = path.with_name(path.name + files.DIGEST_SUFFIX)
            digest = told.read_text() if told.exists() else self._hashed.get(same) or files.sha256(path)
            self._hashed[same] = digest
            found[path.relative_to(folder).as_posix()] = {"size": stat.st_size, "sha256": digest}
        if len(self._hashed) > _REMEMBERED:
            self._hashed.clear()  # at once: a round may be written down while a checkpoint is finished
        return found

    def _numbered(self, name: re.Pattern[str]) -> list[tuple[int, Path]]:
        found = self._root.iterdir() if self._root.is_dir() else ()
        return [(int(match[1]), path) for path in found if (match := name.fullmatch(path.name))]


def _what(target: Path) -> str:
    return f"a training checkpoint ({target.name})"


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint, naming the file; empty where nothing is."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != _FORMAT:
            return f"{folder / INDEX} has format {index['format']}, not {_FORMAT}."
        wanted: dict[str, dict[str, int | str]] = index["files"]
        # Sizes first: a file that was cut short is found without reading the others.
        for name, file in wanted.items():
            if (size := (folder / name).stat().st_size) != file["size"]:
                return f"{folder / name} has {size:,} bytes instead of {file['size']:,}."
        for name, file in wanted.items():
            if files.sha256(folder / name) != file["sha256"]:
                return f"{folder / name} was altered."
    except FileNotFoundError as error:
        return f"{error.filename} is missing."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / INDEX} cannot be read: {error}."
    return ""
