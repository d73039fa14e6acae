"""A disk that is full, and one that does not answer: refused with a clear error, and nothing half-written.

    python -m tests.faults.disk full | slow-sqlite | slow-postgres

`full` puts the database on a file system of 8 MiB and fills it; it mounts one, so start it through `IN_A_NAMESPACE`.
`slow` makes commits wait: a lock that is not let go for a while (SQLite), or all of the server stopped (PostgreSQL).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from services.collector.sqlite import inbox_path
from tests.faults.checker import Verdict
from tests.faults.cluster import Cluster, cluster
from tests.faults.collector import settled, voting
from tests.faults.injected import fill
from tests.faults.load import Load

IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
NO_SPACE = "FAILED_PRECONDITION: The collector cannot write to its database"
TOO_LONG = "DEADLINE_EXCEEDED: The database took longer than 0.3 s. Send it again with the same key"
TOO_MANY = "RESOURCE_EXHAUSTED: 4 submissions wait for the database."
_SECONDS = 60.0
_SLOW = ("--write-timeout-seconds", "0.3", "--max-pending-writes", "4")


async def full() -> tuple[Verdict, Load]:
    """Votes while the disk is full, and after it has space again."""
    with _small_disk() as disk, cluster("sqlite", disk=disk) as made:
        load = Load(made.deployment, random.Random(1))
        async with voting(made, load):
            await _until(lambda: len(load.journal) >= 20)
            filler = disk / "filler"
            fill(filler)
            await _until(lambda: sum(NO_SPACE in refusal for refusal in load.refusals) >= 40)
            said = len(load.journal)
            filler.unlink()
            await _until(lambda: len(load.journal) >= said + 40)
        assert made.query("PRAGMA integrity_check") == [("ok",)]
        return await settled(made, load), load


async def slow(database: str) -> tuple[Verdict, Load]:
    """Votes while commits have to wait, three times."""
    with cluster(database, _SLOW) as made:
        load = Load(made.deployment, random.Random(1))
        async with voting(made, load):
            for _ in range(3):
                said, refused = len(load.journal), len(load.refusals)
                await _until(lambda said=said: len(load.journal) >= said + 20)  # type: ignore[misc]  # bound by default
                with _stalled(made):
                    await _until(lambda refused=refused: _told_both(load.refusals[refused:]))  # type: ignore[misc]
        return await settled(made, load), load


def _told_both(refusals: list[str]) -> bool:
    return all(any(refusal.startswith(kind) for refusal in refusals) for kind in (TOO_LONG, TOO_MANY))


@contextlib.contextmanager
def _stalled(made: Cluster) -> Iterator[None]:
    if made.postgres is not None:
        with made.postgres.stopped():
            yield
        return
    inbox = inbox_path(made.file)
    with contextlib.closing(sqlite3.connect(inbox, timeout=_SECONDS, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def _small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="thumbwheel-disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True, timeout=_SECONDS)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True, timeout=_SECONDS)


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(_SECONDS):
        while not true():  # noqa: ASYNC110 - what is awaited is another process
            await asyncio.sleep(0.02)


def main() -> int:
    """Runs what is named; status 1 where the history does not hold."""
    what = sys.argv[1]
    verdict, load = asyncio.run(full() if what == "full" else slow(what.removeprefix("slow-")))
    counts = ", ".join(f"{count:,} {name}" for name, count in verdict.counts.items())
    print(f"{what} disk: {len(load.refusals)} refusals, such as: {load.refusals[-1]}")
    print(f"  {counts}")
    for violation in (*verdict.lost, *verdict.doubled, *verdict.reordered, *verdict.wrong):
        print(f"  VIOLATED: {violation}")
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
