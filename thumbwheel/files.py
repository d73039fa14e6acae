"""Files that survive a power cut, their hashes, and what a full disk looks like."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from thumbwheel import errors


def sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Forces every file and folder under `folder`, and the folder itself, to the disk; the deepest first."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(where, name))
        sync(Path(where))


def write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Writes and syncs a file that must not exist yet. Raises `FileExistsError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy, where that is on another disk, or the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


DIGEST_SUFFIX = ".sha256"
"""Of the file beside another one that holds its SHA-256, where who wrote it has worked that out."""


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Read in chunks, outside the interpreter's lock."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digest:
    """SHA-256 worked out beside: hashing is the processor's work, and what else is done with the bytes mostly is not.

    To be used in a `with` statement. What is given must not change before `wait`, or the next call of `update`.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "hashing")
        self._last: Future[None] | None = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def update(self, data: bytes | memoryview) -> None:
        """Adds these bytes."""
        self.wait()
        self._last = self._pool.submit(self._digest.update, data)

    def wait(self) -> None:
        """Returns when all that was given is hashed."""
        if self._last is not None:
            self._last.result()

    def hexdigest(self) -> str:
        """Of all that was given, as 64 hexadecimal digits."""
        self.wait()
        return self._digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def tree_size(folder: Path) -> int:
    """Bytes in all files under `folder`; 0 where there is none. Files may come and go meanwhile."""
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(where, name).lstat().st_size
    return size


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises `errors.NoSpace` where the disk under the existing `folder` has fewer than `needed` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(folder, needed, what)


@contextmanager
def space_errors(folder: Path, needed: int | Callable[[], int], what: str) -> Iterator[None]:
    """Turns a full disk (or quota) inside the block into `errors.NoSpace`, naming `folder` and the bytes needed."""
    try:
        yield
    except errors.NoSpace:
        raise  # an inner block has said it already
    except Exception as error:
        if not _is_no_space(error):
            raise
        raise _no_space(folder, needed if isinstance(needed, int) else needed(), what) from error


def _no_space(folder: Path, needed: int, what: str) -> errors.NoSpace:
    free = shutil.disk_usage(folder).free
    return errors.NoSpace(
        f"No space in {folder} for {what}: at least {needed:,} bytes needed, {free:,} free.",
        remedy="Free some space there, or choose another folder, and try again.",
    )


def _is_no_space(error: BaseException) -> bool:
    # Libraries with a native core (safetensors, tokenizers) report the disk's error as text, not as an OSError.
    full = (errno.ENOSPC, errno.EDQUOT)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in full:
            return True
        if any(os.strerror(number) in str(link) for number in full):
            return True
        link = link.__cause__ or link.__context__
    return False
