"""`make faults-restarts`: two replicas of the policy, restarted in turns while people use them.

    world:   a broker, a store, two policy services, users who stream, who ask whole, and one who asks in bulk
    turn:    SIGTERM to one; it drains and ends; it starts again, and once it answers, the other's turn comes
    check:   no call fails; each response is whole; each was recorded; no process ends but as it should

The client has both addresses and one policy: nobody tells it which one is away. Users rest between two questions, as
people do: without, what starts has half a core, and takes twice as long. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.support import Deployment, Process, free_port, make_tiny_llama, until
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.status import scrape
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.rollout_pb2 import ModelRole

TOKENS = 64
REST_SECONDS = 1.0
"""Of a user, on average; and between two rollouts that are asked for."""


@dataclass
class Report:
    """What came of it."""

    restarts: int = 0
    calls: int = 0
    bulk: int = 0
    failed: list[str] = field(default_factory=list)
    unrecorded: int = 0
    statuses: list[int] = field(default_factory=list)
    drains: list[float] = field(default_factory=list)

    def line(self) -> str:
        """One line of JSON."""
        told = {"faults": "restarts", **asdict(self), "failed": len(self.failed)}
        told["statuses"] = sorted(set(self.statuses))
        drains = sorted(told.pop("drains"))
        told["drain_seconds"] = {"median": round(drains[len(drains) // 2], 2), "most": round(drains[-1], 2)}
        return json.dumps(told)


@dataclass
class World:
    """Everything that runs."""

    replicas: Sequence[Process]
    client: AsyncClient
    report: Report = field(default_factory=Report)
    finished: set[str] = field(default_factory=set)
    """Generations that somebody was given."""
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def user(self, number: int) -> None:
        """Asks one question after the other: streams, or asks whole."""
        turn, dice = 0, random.Random(number)
        while not self.ending.is_set():
            await asyncio.sleep(dice.expovariate(1 / REST_SECONDS))
            turn += 1
            sampling = pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=1000 * number + turn)
            try:
                if number % 2:
                    generation = await self.client.generate(f"I am user {number}", sampling=sampling)
                else:
                    stream = self.client.stream(f"I am user {number}", sampling=sampling)
                    pieces = [piece async for piece in stream]
                    generation = pieces[-1]  # type: ignore[assignment]  # the last is whole
                self._got(generation)
            except errors.ThumbwheelError as error:
                self.report.failed.append(f"user {number}: {type(error).__name__}: {error}")
            self.report.calls += 1

    async def rollouts(self) -> None:
        """One call in bulk, from beginning to end; what a replica did not answer goes to the other."""
        asked: set[str] = set()
        numbers = itertools.count()

        async def requests() -> AsyncIterator[pb.GenerateBulkRequest]:
            sampling = pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            while not self.ending.is_set():
                await asyncio.sleep(REST_SECONDS)
                name = f"{next(numbers)}"
                asked.add(name)
                yield pb.GenerateBulkRequest(
                    request_id=name, prompt=pb.Prompt(text=f"Rollout {name}"), sampling=sampling
                )

        try:
            async for response in self.client.bulk(requests()):
                asked.discard(response.request_id)
                self._got(response.generations[0])
                self.report.bulk += 1
        except errors.ThumbwheelError as error:
            self.report.failed.append(f"bulk: {type(error).__name__}: {error}")
        if asked:
            self.report.failed.append(f"bulk: {len(asked)} requests were not answered")

    def _got(self, generation: pb.Generation) -> None:
        if len(generation.token_ids) != TOKENS:
            self.report.failed.append(f"{generation.generation_id} has {len(generation.token_ids)} tokens")
        self.finished.add(generation.generation_id)

    async def restart(self, replica: Process) -> None:
        """SIGTERM, its end, its start; until it has answered somebody."""
        replica.popen.terminate()
        start = time.monotonic()
        self.report.statuses.append(await asyncio.to_thread(replica.popen.wait, 60))
        self.report.drains.append(time.monotonic() - start)
        await asyncio.to_thread(replica.start().wait_serving)

        async def answers() -> bool:
            found = await asyncio.to_thread(scrape, f"127.0.0.1:{replica.metrics_port}")
            return found.total("grpc_server_handled_total") > 0

        await until(answers)
        self.report.restarts += 1


async def recorded(log: Log, wanted: set[str]) -> set[str]:
    """Which of these generations are on the stream, once it has no more to say."""
    consumer = log.consumer([topics.GENERATIONS], group="restarts")
    found: set[str] = set()
    deadline = time.monotonic() + 60
    while not wanted <= found and time.monotonic() < deadline:
        for record in await asyncio.to_thread(consumer.poll, 0.5):
            found.add(GenerationEvent.FromString(record.value).event_id)
    consumer.close()
    return found & wanted


async def run(folder: Path, *, restarts: int, users: int) -> Report:
    """All of it."""
    deployment = Deployment(folder / "home")
    deployment.publish_copy(ModelRole.MODEL_ROLE_POLICY, 0, make_tiny_llama(folder / "weights", seed=0))
    with EmbeddedBroker(port=free_port(), log=folder / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        arguments = ["--home", str(deployment.home), "--bootstrap-servers", broker.bootstrap_servers]
        arguments += ["--max-model-len", "512"]
        cores = sorted(os.sched_getaffinity(0))
        replicas = [
            Process("services.policy", [*arguments, "--cpu-threads-bind", str(core)], folder / f"policy-{n}.log")
            for n, core in enumerate((cores[0], cores[-1]))
        ]
        try:
            for replica in replicas:
                replica.start()
            for replica in replicas:
                await asyncio.to_thread(replica.wait_serving)
            both = "ipv4:" + ",".join(replica.address for replica in replicas)
            async with AsyncClient(policy=both, timeout=60.0) as client:
                world = World(replicas, client)
                asking = [asyncio.create_task(world.user(number)) for number in range(users)]
                asking.append(asyncio.create_task(world.rollouts()))
                for number in range(restarts):
                    await world.restart(replicas[number % 2])
                    if (number + 1) % 10 == 0:
                        print(f"{number + 1} of {restarts}: {world.report.line()}", flush=True)
                world.ending.set()
                async with asyncio.timeout(120):
                    await asyncio.gather(*asking)
            world.report.unrecorded = len(world.finished - await recorded(log, world.finished))
        finally:
            for replica in replicas:
                replica.kill()
            log.close()
    return world.report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.restarts", description=__doc__)
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--users", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), **vars(given)))
    for fault in report.failed:
        print(fault)
    print(report.line())
    sys.exit(1 if report.failed or report.unrecorded or set(report.statuses) != {0} else 0)


if __name__ == "__main__":
    main()
