"""`make faults-swap`: a policy under load, a thousand versions one after the other, many of them sabotaged.

    world:   a broker, a store, the policy service, users who ask all the time
    turn:    publish a version, perhaps sabotage it, announce it; wait until it is live, or refused
    check:   users finish what they are at; the answers must be those of a cold start on the weights that are to be live

No call may fail, but for those that a `kill -9` of the server meets: none are under way then. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.sabotage import SABOTAGES, by_delta, server_killed, sound
from tests.faults.swapped import POLICY, Answers, Report, Weights, World, answers
from tests.support import Deployment, Process, free_port, make_tiny_llama, probe_of
from thumbwheel.client import AsyncClient
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker

KILL_EVERY = 100


async def turns(world: World, swaps: int, share: float, seed: int) -> None:
    """The swaps, one after the other, each with its check. Sabotages take turns, so that each kind comes up."""
    dice, kinds = random.Random(seed), list(SABOTAGES)
    dice.shuffle(kinds)
    for number in range(1, swaps + 1):
        chosen = (world.live + 1 + dice.randrange(len(world.weights) - 1)) % len(world.weights)
        if dice.random() < share:
            kind = kinds[world.report.sabotaged % len(kinds)]
            await SABOTAGES[kind](world, chosen)  # type: ignore[misc]  # each is a coroutine
        else:
            kind = dice.choice(["sound", "by delta"])
            await (sound if kind == "sound" else by_delta)(world, chosen)
        world.report.swaps += 1
        world.report.outcomes[kind] += 1
        await world.check(kind)
        if number % KILL_EVERY == 0:
            await server_killed(world, chosen)
            await world.check("server killed")
        if number % 25 == 0:
            print(f"{number} of {swaps}: {dict(world.report.outcomes)}", flush=True)


def policy_process(home: Path, bootstrap_servers: str) -> Process:
    """The service, starting."""
    arguments = ["--home", str(home), "--bootstrap-servers", bootstrap_servers, "--max-model-len", "256"]
    return Process("services.policy", [*arguments, "--max-tokens", "128"], home / "policy.log").start()


async def cold_answers(process: Process) -> Answers:
    """What a server answers that has just been started, whose end this is."""
    await asyncio.to_thread(process.wait_serving)
    async with AsyncClient(policy=process.address, timeout=60.0) as client:
        found = await answers(client)
    process.kill()
    return found


async def run(folder: Path, *, swaps: int, share: float, weights: int, users: int, seed: int) -> Report:
    """All of it. First a server is started cold on each set of weights; that of the first goes on to be swapped."""
    report = Report()
    models = [make_tiny_llama(folder / f"weights-{number}", seed=number) for number in range(weights)]
    probes = [probe_of(model) for model in models]
    deployments = [Deployment(folder / f"home-{number}") for number in range(weights)]
    for deployment, model, probe in zip(deployments, models, probes, strict=True):
        deployment.publish_copy(POLICY, 0, model, probes=[probe])
    with EmbeddedBroker(port=free_port(), log=folder / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        producer = log.producer()
        processes = [policy_process(deployment.home, broker.bootstrap_servers) for deployment in deployments]
        try:
            cold = [await cold_answers(process) for process in processes[1:]]
            first = await asyncio.to_thread(processes[0].wait_serving)
            async with AsyncClient(policy=first.address, timeout=60.0) as client:
                found = [await answers(client), *cold]
                of = [Weights(*three) for three in zip(models, probes, found, strict=True)]
                world = World(deployments[0], producer, processes, client, of, report)
                await use(world, swaps, share, users, seed)
        finally:
            for process in processes:
                process.kill()
            producer.close(5)
            log.close()
    return report


async def use(world: World, swaps: int, share: float, users: int, seed: int) -> None:
    """The users, and the swaps that they are not to notice."""
    world.open.set()
    asking = [asyncio.create_task(world.user(number)) for number in range(users)]
    try:
        await turns(world, swaps, share, seed)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.swaps", description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.2, help="share of the swaps that are sabotaged")
    parser.add_argument("--weights", type=int, default=3, help="how many sets of weights take turns")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), **vars(given)))
    for fault in [*report.failed, *report.wrong]:
        print(fault)
    print(f"{time.monotonic() - started:.0f} s")
    print(report.line())
    sys.exit(1 if report.failed or report.wrong else 0)


if __name__ == "__main__":
    main()
