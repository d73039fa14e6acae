"""A model in the cache: whole and with the hashes of its files, or not there.

cache/<key>/<name>/         the model
cache/<key>/SHA256SUMS      its files' hashes, as `sha256sum --check` reads them
cache/partial/<key>/        what has been fetched so far
cache/partial/<key>.lock    held by the process that is fetching
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from thumbwheel import errors, files

_log = logging.getLogger(__name__)

_LOCK_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Entry:
    """A place in the cache. `key` names model and revision, `name` is what the model's folder is called."""

    cache: Path
    key: str
    name: str

    @property
    def home(self) -> Path:
        """The folder with the model and its hashes."""
        return self.cache / self.key

    @property
    def folder(self) -> Path:
        """The model."""
        return self.home / self.name

    @property
    def partial(self) -> Path:
        """Where steps leave what they have finished."""
        return self.cache / "partial" / self.key

    def get(self, fill: Callable[[Path], None]) -> Path:
        """The model's folder. Where it is not there, or damaged, `fill` makes it in a fresh folder that it is given.

        `fill` may keep finished steps in `partial`, which lasts until the model is installed. One process fills, others
        wait. Raises `errors.DeadlineExceeded` after an hour of that, and what `fill` raises.
        """
        if self.home.exists() and self._damaged() is None:
            return self.folder  # without a lock, so that a cache on a read-only disk works
        with files.space_errors(_existing(self.cache), self._partial_size, self.name), self._lock():
            if self.home.exists():
                damaged = self._damaged()
                if damaged is None:
                    return self.folder
                _log.warning("%s is damaged: fetching %s again", damaged, self.name)
                shutil.rmtree(self.home)
            # What a killed process was filling is not to be trusted: begun anew.
            staging = self.partial / "staging"
            shutil.rmtree(staging, ignore_errors=True)
            (staging / self.name).mkdir(parents=True)
            fill(staging / self.name)
            self._install(staging)
        return self.folder

    def _partial_size(self) -> int:
        return files.tree_size(self.partial)

    def _install(self, staging: Path) -> None:
        lines = []
        for path in _files(staging):
            path.chmod(0o644)  # libraries write weights for their owner only; a cache may be shared
            lines.append(f"{files.sha256(path)}  {path.relative_to(staging).as_posix()}\n")
        files.write_new(staging / _SUMS, "".join(lines).encode(), mode=0o644)
        files.sync_tree(staging)
        staging.rename(self.home)
        files.sync(self.cache)
        shutil.rmtree(self.partial)

    def _damaged(self) -> Path | None:
        """The first file that is not what it was when it was installed, if there is one."""
        sums = self.home / _SUMS
        try:
            lines = sums.read_text("utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return sums
        expected = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
        found = {p.relative_to(self.home).as_posix() for p in _files(self.home)} - {_SUMS}
        if not expected:
            return sums
        for path in sorted(expected.keys() ^ found):
            return self.home / path
        return next((self.home / p for p, digest in expected.items() if files.sha256(self.home / p) != digest), None)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.partial.mkdir(parents=True, exist_ok=True)
        path = self.partial.with_name(f"{self.key}.lock")
        deadline = time.monotonic() + _LOCK_SECONDS
        with path.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise errors.DeadlineExceeded(
                            f"Another process has been fetching {self.name} for over an hour (it holds {path}).",
                            remedy="Stop that process, then try again.",
                        ) from None
                    time.sleep(_POLL_SECONDS)
            yield


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
