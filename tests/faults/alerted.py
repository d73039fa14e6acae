"""Every fault of the collector and what it talks to, one after the other, under load, watched by a real Prometheus.

    python -m tests.faults.alerted --database both --seed 1

Of each fault: which alert told of it, how many evaluations after it could be seen, how long after it healed things were
as before; and of each database, what the history checker decides. A fault lasts until its alert fires, and two seconds
at least. The full disk is a file system of its own: start it through `disk.IN_A_NAMESPACE`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import injected
from tests.faults.checker import Acked, Asked, Verdict
from tests.faults.cluster import Cluster, cluster
from tests.faults.collector import settled, voting
from tests.faults.load import Load
from tests.faults.proxy import FAULTS
from tests.monitoring.prometheus import Prometheus, prometheus

MOST_RECOVERY_SECONDS = 5.0
MOST_EVALUATIONS = 2
MOST_RETRIES = 1.1

_LEAST_SECONDS = 2.0
_ALERT_SECONDS = 60.0
_BEARABLE_SECONDS = 15.0
_SETTLE_SECONDS = 60.0
_DISK_BYTES = 96 * 2**20
_EVALUATION_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """A fault, how it comes about, and the alerts of which one must tell of it; none where clients alone can know.
    What is `bearable` may also raise none, where clients are answered all the same.
    """

    name: str
    make: Callable[[Cluster], injected.Context]
    alerts: Sequence[str] = ()
    bearable: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a fault. `evaluations` is None where no alert was to tell of it."""

    name: str
    database: str
    alert: str
    evaluations: int | None
    recovery_seconds: float

    @property
    def as_promised(self) -> bool:
        """Whether it was told of and passed as promised."""
        told = self.evaluations is None or self.evaluations <= MOST_EVALUATIONS
        return told and self.recovery_seconds <= MOST_RECOVERY_SECONDS


DOWN, BROKER, DATABASE = "ThumbwheelPartDown", "ThumbwheelBrokerAway", "ThumbwheelDatabaseAway"


def cases(database: str) -> list[Case]:
    """All that can be done to a collector on "sqlite" or "postgres"."""
    made = [Case(f"clients {fault}", injected.link("clients", fault)) for fault in FAULTS]
    made += [Case(f"broker {fault}", injected.link("broker", fault), (BROKER,)) for fault in FAULTS]
    made += [
        Case("collector kill -9", injected.killed, (DOWN,)),
        Case("collector stopped", injected.stopped, (DOWN,)),
        Case("broker kill -9", injected.without_broker, (BROKER,)),
        Case("memory", injected.without_memory, (DOWN, DATABASE), bearable=True),
        Case("clock", injected.clock_jumps, ("ThumbwheelClockOff",)),
    ]
    if database == "postgres":
        # Where the database does not answer, neither may the collector's metrics in time.
        away = (DATABASE, DOWN, "ThumbwheelCommitsSlow")
        made += [Case(f"database {fault}", injected.link("database", fault), away) for fault in FAULTS]
        made += [
            Case("database kill -9", injected.without_database, (DATABASE,)),
            Case("database stopped", injected.database_stopped, away),
        ]
    else:
        made += [
            Case("disk slow", injected.slow_disk, ("ThumbwheelCommitsSlow",)),
            Case("disk full", injected.full_disk, ("ThumbwheelDiskFull",)),
        ]
    return made


async def run(
    database: str, seed: int, chosen: Callable[[str], bool], say: Callable[[str], None]
) -> tuple[list[Outcome], Verdict, float]:
    """All faults that are chosen, in an order that the seed decides, on one deployment.

    Returns what became of each, the verdict on all of it, and how often a submission was done, by submission.
    """
    todo = [case for case in cases(database) if chosen(case.name)]
    random.Random(seed).shuffle(todo)
    with (
        _home(database) as home,
        cluster(database, proxied=True, home=home) as made,
        tempfile.TemporaryDirectory(prefix="thumbwheel-prometheus-") as watched,
        prometheus(
            Path(watched),
            {"collector": f"127.0.0.1:{made.collector.metrics_port}"},
            evaluation_seconds=_EVALUATION_SECONDS,
        ) as watching,
    ):
        load = Load(made.deployment, random.Random(seed))
        outcomes = []
        async with voting(made, load):
            for case in todo:
                say(f"  {case.name} ...")
                await _calm(watching, load, case)
                outcomes.append(await _one(case, database, made, watching, load))
                say(_told(outcomes[-1]))
        distinct = len({entry.vote.key for entry in load.journal if isinstance(entry, Asked)})
        return outcomes, await settled(made, load), (distinct + load.done_again) / distinct


async def _one(case: Case, database: str, made: Cluster, watching: Prometheus, load: Load) -> Outcome:
    alert, evaluations = "", None
    async with case.make(made):
        least = time.monotonic() + _LEAST_SECONDS
        if case.alerts:
            alert, evaluations = await _told_of(case, watching, load)
        await asyncio.sleep(max(0.0, least - time.monotonic()))
    healed = time.monotonic()
    load.acked_at, load.asked_after = 0.0, healed
    behind = await injected.ask(made, injected.COMMITTED)
    if case.name.startswith("broker kill"):
        made.publish(load.generations)
    left = f"SELECT count(*) FROM outbox WHERE published_at IS NULL AND id <= {behind}"
    async with asyncio.timeout(_SETTLE_SECONDS):
        while not load.acked_at or await injected.ask(made, left):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    return Outcome(case.name, database, alert, evaluations, time.monotonic() - healed)


async def _told_of(case: Case, watching: Prometheus, load: Load) -> tuple[str, int | None]:
    """Which of the alerts fires first, and at which evaluation since one first found it so. Raises TimeoutError."""
    seconds = _BEARABLE_SECONDS if case.bearable else _ALERT_SECONDS
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, now = await asyncio.to_thread(watching.alerts), time.time()
        for alert in found:
            if alert.name in case.alerts and alert.state == "firing":
                return alert.name, watching.evaluations(alert, now)
        await asyncio.sleep(0.05)
    known = len(load.journal)
    await asyncio.sleep(_LEAST_SECONDS)
    if case.bearable and any(isinstance(entry, Acked) for entry in load.journal[known:]):
        return "", None
    raise TimeoutError(f"{case.name}: none of {', '.join(case.alerts)} fires after {seconds:g} s")


async def _calm(watching: Prometheus, load: Load, case: Case) -> None:
    """Until nothing fires of what the next fault is to raise, and clients are answered."""
    acked = len(load.journal)
    async with asyncio.timeout(2 * _ALERT_SECONDS + 30.0):
        while set(case.alerts) & {alert.name for alert in await asyncio.to_thread(watching.alerts)}:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while len(load.journal) < acked + 20:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def _home(database: str) -> Iterator[Path]:
    """A folder; for SQLite on a small file system of its own (see `disk.IN_A_NAMESPACE`)."""
    with tempfile.TemporaryDirectory(prefix="thumbwheel-home-") as folder:
        if database != "sqlite":
            yield Path(folder)
            return
        size = f"size={_DISK_BYTES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True, timeout=60)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True, timeout=60)


def _told(outcome: Outcome) -> str:
    told = (
        "no alert tells of it"
        if outcome.evaluations is None
        else (f"{outcome.alert} at evaluation {outcome.evaluations}")
    )
    missed = "" if outcome.as_promised else "  MISSED"
    return f"  {outcome.name:<22} {told}; as before {outcome.recovery_seconds:.1f} s after it healed{missed}"


def summary(
    outcomes: Sequence[Outcome], verdicts: Sequence[Verdict], retries: Sequence[float], seed: int
) -> dict[str, Any]:
    """The closing line."""
    return {
        "faults": "alerted",
        "seed": seed,
        "injected": len(outcomes),
        "alerted": sum(outcome.evaluations is not None for outcome in outcomes),
        "most_evaluations": max((outcome.evaluations or 0 for outcome in outcomes), default=0),
        "most_recovery_seconds": round(max((outcome.recovery_seconds for outcome in outcomes), default=0.0), 2),
        "lost": sum(len(verdict.lost) for verdict in verdicts),
        "doubled": sum(len(verdict.doubled) for verdict in verdicts),
        "reordered": sum(len(verdict.reordered) for verdict in verdicts),
        "wrong": sum(len(verdict.wrong) for verdict in verdicts),
        "retries": round(max(retries, default=1.0), 4),
        "acknowledged": sum(verdict.counts["acknowledged"] for verdict in verdicts),
        "missed": [f"{outcome.database}: {outcome.name}" for outcome in outcomes if not outcome.as_promised],
    }


def main() -> int:
    """Parses the arguments, runs, and says how it went; status 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.alerted", description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--seed", type=int, default=1, help="decides the order (default %(default)s)")
    parser.add_argument("--only", default="", help="those faults alone whose names begin so")
    given = parser.parse_args()
    outcomes: list[Outcome] = []
    verdicts, retries = [], []
    for database in ["sqlite", "postgres"] if given.database == "both" else [given.database]:
        print(f"{database}, seed {given.seed}", flush=True)
        came, verdict, tries = asyncio.run(
            run(database, given.seed, lambda name: name.startswith(given.only), lambda line: print(line, flush=True))
        )
        outcomes += came
        verdicts.append(verdict)
        retries.append(tries)
        for kind in ("lost", "doubled", "reordered", "wrong"):
            for violation in getattr(verdict, kind):
                print(f"  {kind.upper()}: {violation}")
    print(json.dumps(summary(outcomes, verdicts, retries, given.seed)))
    kept = all(outcome.as_promised for outcome in outcomes) and max(retries) <= MOST_RETRIES
    return 0 if kept and all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
