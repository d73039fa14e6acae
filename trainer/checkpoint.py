"""Training checkpoints: everything a task is, in one folder that is there whole or not at all.

    root/checkpoint-000012/index.json     every other file with its size and SHA-256
    root/.staging                         one being written

A folder appears by one rename, after its files are hashed and synced. It is the trainer's own and stays with it:
weights in it are DeepSpeed's pickles, which is why nothing is read before its hash is checked.
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


class TrainingCheckpoints:
    """The checkpoints of one task in `root`, of which the newest `keep` are kept."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self._root = root
        self._keep = keep

    def write(self, number: int, fill: Callable[[Path], None]) -> Path:
        """Makes checkpoint `number` of what `fill` writes into a folder. One that has that number is replaced: only a
        corrupt one can be there. Raises `errors.NoSpace`; then nothing has changed.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        staging, target = self._root / ".staging", self._root / f"checkpoint-{number:06d}"
        newest = max(self._numbered(), default=None)
        needed = files.tree_size(newest[1]) if newest else 0
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with files.space_errors(self._root, needed, f"a training checkpoint ({target.name})"):
                files.require_space(self._root, needed, f"a training checkpoint ({target.name})")
                staging.mkdir()
                fill(staging)  # 1
                index = {"format": _FORMAT, "files": _describe(staging)}  # 2
                (staging / INDEX).write_text(json.dumps(index, indent=1))
                files.sync_tree(staging)  # 3
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)  # 4
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        files.sync(self._root)
        for _, old in sorted(self._numbered(), reverse=True)[self._keep :]:
            shutil.rmtree(old)
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None where there is none at all.

        One that does not verify is passed over with an error in the log. Raises `errors.CorruptCheckpoint` where there
        are some and none verifies: beginning anew would learn everything twice.
        """
        faults = []
        for _, folder in sorted(self._numbered(), reverse=True):
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

    def _numbered(self) -> list[tuple[int, Path]]:
        found = self._root.iterdir() if self._root.is_dir() else ()
        return [(int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name))]


def _describe(folder: Path) -> dict[str, dict[str, int | str]]:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != INDEX
    }


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
