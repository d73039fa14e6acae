"""Kills the collector, its broker and its database at random points of load; a history checker decides what it did.

    python -m tests.faults.collector --kills 200 --seed 1 --database both

Episodes of some kills each: real processes, clients with a journal, then everything is started and left to settle, and
`checker` compares the journal, the stream and the database. The schedule of an episode follows from its seed, which is
printed: `--seed S --kills N --database D` runs it again. The last line is one JSON object; the status is 1 where
anything was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults import observe
from tests.faults.checker import Verdict, check
from tests.faults.cluster import Cluster, cluster
from tests.faults.load import Load

CLIENTS = 8
PAUSE_SECONDS = 0.15
KILLS_AN_EPISODE = 20
SETTLE_SECONDS = 90.0
_TARGETS = {
    "sqlite": {"collector": 4, "admitting": 3, "taking": 3, "relay": 3, "broker": 3},
    "postgres": {"collector": 3, "admitting": 3, "taking": 3, "relay": 3, "broker": 2, "database": 4},
}


@dataclass(frozen=True, slots=True)
class Episode:
    """What one episode came to."""

    database: str
    seed: int
    kills: Counter[str]
    verdict: Verdict
    seconds: float


async def run_episode(database: str, seed: int, kills: int) -> Episode:
    """Some kills under load on a new deployment, and the checker's verdict on all of it."""
    draw, began = random.Random(seed), time.monotonic()
    with cluster(database) as made:
        load = Load(made.deployment, random.Random(draw.random()))
        done: Counter[str] = Counter()
        async with voting(made, load):
            for _ in range(kills):
                await asyncio.sleep(draw.uniform(0.05, 0.6))
                [target] = draw.choices(list(_TARGETS[database]), list(_TARGETS[database].values()))
                await _kill(made, target, draw, load)
                done[target] += 1
        verdict = await settled(made, load)
    return Episode(database, seed, done, verdict, time.monotonic() - began)


async def settled(made: Cluster, load: Load) -> Verdict:
    """Lets all of it come to rest, ends the collector, and has the history checked."""
    await asyncio.to_thread(made.publish, load.generations)
    await asyncio.to_thread(observe.await_none_waiting, made.query, SETTLE_SECONDS)
    verdict = check(await asyncio.to_thread(made.history, load.journal))
    status = await asyncio.to_thread(made.collector.stop)
    assert status == 0, f"the collector ended with status {status} after it had settled"
    return verdict


@contextlib.asynccontextmanager
async def voting(made: Cluster, load: Load) -> AsyncIterator[None]:
    """Clients vote, and a policy publishes, while the body runs; at its end all that was asked has been answered."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:  # a client that fails ends the body
        serving = group.create_task(_serve(made, load))
        voting = group.create_task(load.run(made.address, clients=CLIENTS, pause=PAUSE_SECONDS, stop=stop))
        yield
        stop.set()
        async with asyncio.timeout(SETTLE_SECONDS):
            await voting
        serving.cancel()


async def _serve(made: Cluster, load: Load) -> None:
    while True:
        arrived, load.arrived = load.arrived, []
        if arrived:
            made.publish(arrived)
        await asyncio.sleep(0.02)


async def _kill(made: Cluster, target: str, draw: random.Random, load: Load) -> None:
    """kill -9, some time without it, and a new start. The relay is killed when there is something for it to publish.
    The processes of its two stages, which take in and record what it acknowledges, are started again by the collector.
    """
    away = draw.uniform(0.0, 0.3)
    match target:
        case "collector":
            made.collector.kill()
            await asyncio.sleep(away)
            await asyncio.to_thread(made.start_collector)
        case "admitting" | "taking":
            os.kill(await _stage_of(made, f"services.collector.{target}"), signal.SIGKILL)
        case "relay":
            await _until_it_publishes(made)
            made.collector.kill()
            await asyncio.sleep(away)
            await asyncio.to_thread(made.start_collector)
        case "broker":
            await asyncio.to_thread(made.kill_broker)
            await asyncio.sleep(away)
            # In this thread: the broker ends with the thread that started it.
            made.start_broker()
            made.publish(load.generations)
        case "database":
            assert made.postgres is not None
            await asyncio.to_thread(made.postgres.kill)
            await asyncio.sleep(away)
            await asyncio.to_thread(made.postgres.start)


async def _stage_of(made: Cluster, stage: str) -> int:
    """The id of a stage's process, which is started when there is something for it to do."""
    async with asyncio.timeout(20.0):
        while not (found := made.collector.children(stage)):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
    return found[0]


async def _until_it_publishes(made: Cluster) -> None:
    async with asyncio.timeout(10.0):
        while (await asyncio.to_thread(observe.waiting, made.query)).unpublished == 0:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.001)


def run(kills: int, seed: int, databases: Sequence[str], *, say: Any = print) -> list[Episode]:
    """Episodes until there were so many kills. Says what each came to."""
    episodes: list[Episode] = []
    left = kills
    while left > 0:
        database = databases[len(episodes) % len(databases)]
        number = min(left, KILLS_AN_EPISODE)
        say(f"episode {len(episodes) + 1}: --seed {seed + len(episodes)} --kills {number} --database {database}")
        episode = asyncio.run(run_episode(database, seed + len(episodes), number))
        killed = ", ".join(f"{target} {count}" for target, count in sorted(episode.kills.items()))
        counts = ", ".join(f"{count:,} {what}" for what, count in episode.verdict.counts.items())
        say(f"  killed {killed} in {episode.seconds:.0f} s: {counts}")
        for kind in ("lost", "doubled", "reordered", "wrong"):
            for violation in getattr(episode.verdict, kind):
                say(f"  {kind.upper()}: {violation}")
        episodes.append(episode)
        left -= number
    return episodes


def summary(episodes: Sequence[Episode], seed: int) -> dict[str, Any]:
    """The closing line."""
    counts: Counter[str] = sum((Counter(episode.verdict.counts) for episode in episodes), Counter())
    kills: Counter[str] = sum((episode.kills for episode in episodes), Counter())
    verdicts = [episode.verdict for episode in episodes]
    return {
        "faults": "collector",
        "seed": seed,
        "kills": kills.total(),
        "killed": dict(sorted(kills.items())),
        "lost": sum(len(verdict.lost) for verdict in verdicts),
        "doubled": sum(len(verdict.doubled) for verdict in verdicts),
        "reordered": sum(len(verdict.reordered) for verdict in verdicts),
        "wrong": sum(len(verdict.wrong) for verdict in verdicts),
        **{what: counts[what] for what in ("submissions", "acknowledged", "comparisons", "records", "repeated")},
    }


def main() -> int:
    """Parses the arguments, runs, and says how it went."""
    parser = argparse.ArgumentParser(prog="make faults-collector", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many to kill (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first episode; the next take the next")
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    given = parser.parse_args()
    databases = ["sqlite", "postgres"] if given.database == "both" else [given.database]
    episodes = run(given.kills, given.seed, databases)
    print(json.dumps(summary(episodes, given.seed)))
    return 0 if all(episode.verdict.holds for episode in episodes) else 1


if __name__ == "__main__":
    sys.exit(main())
