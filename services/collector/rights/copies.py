"""Exported files that the collector knows of, and taking rows out of them.

Beside an export lies its index, `FILE.ids`: for each row the hash of its line and the id of its sample. So a row is
found whatever its format, also where the file was shuffled since, and the index says nothing of its content.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from sqlalchemy import Connection, delete, insert, select

from services.collector import tables
from services.collector.outbox import now_micros
from thumbwheel import errors, files

INDEX = ".ids"
PART = ".part"
_STAGING = ".erasing"


class Scrubbed(NamedTuple):
    """What taking rows out of the exports came to."""

    rows: int
    out_of_reach: list[str]


def index_of(path: Path) -> Path:
    """The index of an export."""
    return path.with_name(path.name + INDEX)


def part_of(path: Path) -> Path:
    """An export while it is being written."""
    return path.with_name(path.name + PART)


def line_hash(line: bytes) -> str:
    """How a line is known again: SHA-256 without its line end, as 64 hexadecimal digits."""
    return hashlib.sha256(line.rstrip(b"\r\n")).hexdigest()


def register(connection: Connection, tenant: str, path: Path) -> None:
    """Notes an export, before anything is written."""
    row = {"host": socket.gethostname(), "path": str(path.resolve())}
    here = (tables.exports.c.host == row["host"]) & (tables.exports.c.path == row["path"])
    connection.execute(delete(tables.exports).where(here))
    connection.execute(insert(tables.exports), row | {"tenant": tenant, "created_at": now_micros()})


def known(connection: Connection, tenant: str) -> list[tuple[str, str]]:
    """Host and path of every export of a tenant."""
    found = select(tables.exports.c.host, tables.exports.c.path).where(tables.exports.c.tenant == tenant)
    return [(host, path) for host, path in connection.execute(found.order_by(tables.exports.c.path))]


@contextmanager
def held(file: IO[bytes]) -> Iterator[None]:
    """While an export is being written, and its writer lives: nobody else takes rows out of it."""
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def scrub_all(exports: list[tuple[str, str]], samples: Set[str]) -> Scrubbed:
    """Takes the rows of these samples out of the exports; names those on other machines, or without their index.

    Raises `errors.Unavailable` while one is being written.
    """
    rows, out_of_reach = 0, []
    for host, name in exports:
        path = Path(name)
        if host != socket.gethostname():
            out_of_reach.append(f"{host}:{name}")
        elif not index_of(path).exists():
            # A file that is gone needs nothing; one whose index is gone may hold anything.
            if path.exists() or part_of(path).exists():
                out_of_reach.append(name)
        elif not path.exists() and not part_of(path).exists():
            out_of_reach.append(name)
        else:
            try:
                rows += scrub(path, samples)
            except OSError as error:
                out_of_reach.append(f"{name} ({error.strerror})")
    return Scrubbed(rows, out_of_reach)


def scrub(path: Path, samples: Set[str]) -> int:
    """Takes the rows of these samples out of an export, whole or half-written. Returns how many. May be done again.

    Raises `errors.Unavailable` while it is being written: its writer would not see what was taken out.
    """
    part = part_of(path)
    if part.exists():
        with part.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise errors.Unavailable(f"{path} is being written.", remedy="Wait for the export to end.") from None
    index = index_of(path)
    doomed: set[str] = set()
    with index.open("rb") as lines:
        for line in lines:
            sha256, _, sample = line.decode().strip().partition(" ")
            if sample in samples:
                doomed.add(sha256)
    if not doomed:
        return 0
    # The rows first: without its index they could not be found again.
    erased = sum(_rewrite(each, doomed) for each in (path, part) if each.exists())
    _rewrite(index, doomed)
    return erased


def _rewrite(path: Path, doomed: Set[str]) -> int:
    """Writes a file anew, without the lines with these hashes, or, for an index, without those that name them."""
    staging, erased = path.with_name(path.name + _STAGING), 0
    with path.open("rb") as old, staging.open("wb") as new:
        for line in old:
            sha256 = line.decode().partition(" ")[0] if path.name.endswith(INDEX) else line_hash(line)
            if sha256 in doomed:
                erased += 1
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.chmod(staging, path.stat().st_mode)
    staging.rename(path)
    files.sync(path.parent)
    return erased
