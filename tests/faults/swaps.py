"""`make faults-swap`: a policy under load, a thousand versions one after the other, many of them sabotaged.

    world:   a broker, a store, the policy service, users who ask all the time
    turn:    publish a version, perhaps sabotage it, announce it; wait until it is live, or refused
    check:   users finish what they are at; the answers must be those of a cold start on the weights that are to be live

No call may fail, but for those that a `kill -9` of the server meets: none are under way then. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import Deployment, Process, announce, free_port, make_tiny_llama, probe_of, until
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.status import scrape
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Producer
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, Probe

POLICY = ModelRole.MODEL_ROLE_POLICY
CHECK = pb.SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
KILL_EVERY = 100

# A publisher that is killed while it writes: it says so, and then waits for its end.
_PUBLISHER = """
import sys, time
from pathlib import Path
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.v1.rollout_pb2 import CheckpointManifest
home, version, sequence = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def write(folder):
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    print("writing", flush=True)
    time.sleep(600)
store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))
store.publish(CheckpointManifest(version=version, role=1, sequence=sequence), write, ManifestSigner.load(home / "keys"))
"""

Answers = list[tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Weights:
    """Weights that versions are made of, over and over, and what they answer."""

    folder: Path
    probe: Probe
    answers: Answers


@dataclass
class Report:
    """What came of it."""

    swaps: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    pauses: list[float] = field(default_factory=list)

    @property
    def sabotaged(self) -> int:
        """Versions that were not as they should have been."""
        return sum(self.outcomes.values()) - self.outcomes["sound"] - self.outcomes["by delta"]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {
                "faults": "swap",
                "swaps": self.swaps,
                "sabotaged": self.sabotaged,
                "outcomes": dict(self.outcomes),
                "calls": self.calls,
                "failed_calls": len(self.failed),
                "wrong_answers": len(self.wrong),
                "kills": self.kills,
                "median_pause_seconds": round(sorted(self.pauses)[len(self.pauses) // 2], 3) if self.pauses else None,
            }
        )


@dataclass
class World:
    """Everything that runs."""

    deployment: Deployment
    producer: Producer
    processes: list[Process]
    """All that were ever started; the first is the one that is swapped."""
    client: AsyncClient
    weights: list[Weights]
    report: Report
    sequence: int = 0
    live: int = 0
    """Which weights are to be live, by index."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0

    @property
    def process(self) -> Process:
        """The one that is swapped."""
        return self.processes[0]

    async def user(self, number: int) -> None:
        """Asks for ever, one question after the other; rests between two where the others do."""
        turn = 0
        while True:
            while not self.open.is_set():  # it may be closed again before this task has its turn
                await self.open.wait()
            turn += 1
            sampling = pb.SamplingParams(max_tokens=48, ignore_eos=True, seed=1000 * number + turn)
            self.busy += 1
            try:
                pieces = [piece async for piece in self.client.stream(f"I am user {number}", sampling=sampling)]
                if len(pieces[-1].token_ids) != 48:
                    self.report.failed.append(f"user {number} got {len(pieces[-1].token_ids)} tokens of 48")
            except errors.ThumbwheelError as error:
                self.report.failed.append(f"user {number}: {error}")
            finally:
                self.busy -= 1
                self.report.calls += 1

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Users have finished what they were at, and ask nothing inside."""
        self.open.clear()

        async def idle() -> bool:
            return self.busy == 0

        await until(idle, every=0.01)
        yield
        self.open.set()

    async def check(self, what: str) -> None:
        """The answers must be, bit for bit, those of a cold start on the weights that are to be live."""
        async with self.quiet():
            found = await answers(self.client)
        if found != self.weights[self.live].answers:
            self.report.wrong.append(f"{self.version()}: {what}")

    def version(self) -> str:
        """The version last published."""
        return f"policy-{self.sequence:06d}"

    def publish(self, model: Path, probe: Probe, *, parent: str = "") -> CheckpointManifest:
        """The next version."""
        self.sequence += 1
        return self.deployment.publish_copy(POLICY, self.sequence, model, probes=[probe], parent=parent)

    def announce(self, manifest: CheckpointManifest, digest: str = "") -> None:
        """Says that a version is to be served."""
        announce(self.producer, manifest, digest or self.deployment.store.load(manifest.version).manifest_sha256)

    async def count(self, metric: str) -> float:
        """A counter of the server."""
        return (await asyncio.to_thread(scrape, f"127.0.0.1:{self.process.metrics_port}")).total(metric)

    async def is_live(self, version: str) -> None:
        """Waits until a version is live."""

        async def live() -> bool:
            return (await self.client.policy()).version == version

        await until(live, every=0.02)


async def answers(client: AsyncClient) -> Answers:
    """Tokens and log-probabilities, one prompt at a time, so that batching cannot differ."""
    found = []
    for number in range(2):
        prompt = pb.Prompt(tokens=pb.TokenIds(ids=[7 + number, *range(20, 32)]))
        answer = await client.generate(prompt, sampling=CHECK)
        found.append((list(answer.token_ids), list(answer.logprobs)))
    return found


async def sound(world: World, chosen: int) -> None:
    """As it should be."""
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    world.announce(manifest)
    await world.is_live(manifest.version)
    world.live = chosen


async def by_delta(world: World, chosen: int) -> None:
    """With a delta against what is live, and without the full weights until it is: only the delta can be it."""
    parent = (await world.client.policy()).version
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe, parent=parent)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    whole, aside = (
        world.deployment.home / "store" / manifest.version / "model.safetensors",
        world.deployment.home / "aside",
    )
    whole.rename(aside)
    world.announce(manifest, digest)
    await world.is_live(manifest.version)
    aside.rename(whole)  # the next one may be a delta against it
    world.live = chosen


def refused(spoil: Callable[[World, int], tuple[CheckpointManifest, str]]) -> Callable[[World, int], object]:
    """A sabotage after which the version is refused or undone, and what was live stays live."""

    async def sabotage(world: World, chosen: int) -> None:
        before = await world.count("thumbwheel_versions_refused_total")
        world.announce(*spoil(world, chosen))

        async def said() -> bool:
            return await world.count("thumbwheel_versions_refused_total") > before

        await until(said, every=0.05)

    return sabotage


def _damaged(world: World, chosen: int, damage: Callable[[bytes], bytes]) -> tuple[CheckpointManifest, str]:
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    path = world.deployment.home / "store" / manifest.version / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    return manifest, digest


def torn(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """The weights end too early."""
    return _damaged(world, chosen, lambda whole: whole[:-1000])


def wrong_hash(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """One bit is another."""
    return _damaged(world, chosen, lambda whole: whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:])


def _changed(world: World, chosen: int, change: str) -> tuple[CheckpointManifest, str]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        for path in world.weights[chosen].folder.iterdir():
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        tensors = load_file(Path(folder) / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        if change == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        else:
            tensors[name][3, 5] = float("nan")
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return world.publish(Path(folder), world.weights[chosen].probe), ""


def wrong_shape(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but of another shape."""
    return _changed(world, chosen, "shape")


def not_a_number(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but a weight is no number."""
    return _changed(world, chosen, "nan")


def other_manifest(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Not the version that was announced."""
    return world.publish(world.weights[chosen].folder, world.weights[chosen].probe), "0" * 64


def wrong_probe(world: World, chosen: int) -> tuple[CheckpointManifest, str]:
    """Signed and whole, but not what the trainer says it is: seen only once it is loaded."""
    other = world.weights[(chosen + 1) % len(world.weights)]
    return world.publish(world.weights[chosen].folder, other.probe), ""


async def store_away(world: World, chosen: int) -> None:
    """The store cannot be read when the version is announced; later it can."""
    manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
    digest = world.deployment.store.load(manifest.version).manifest_sha256
    store, away = world.deployment.home / "store", world.deployment.home / "away"
    store.rename(away)
    before = await world.count("thumbwheel_versions_deferred_total")
    world.announce(manifest, digest)

    async def tried() -> bool:
        return await world.count("thumbwheel_versions_deferred_total") > before

    await until(tried)
    await world.check("while the store is away")
    away.rename(store)
    await world.is_live(manifest.version)
    world.live = chosen


async def publisher_killed(world: World, chosen: int) -> None:
    """Its version is announced nevertheless; it never comes, and the next one does."""
    world.sequence += 1
    command = [sys.executable, "-c", _PUBLISHER, str(world.deployment.home), world.version(), str(world.sequence)]
    publisher = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
    assert publisher.stdout is not None
    assert await asyncio.wait_for(asyncio.to_thread(publisher.stdout.readline), 60) == b"writing\n"
    publisher.send_signal(signal.SIGKILL)
    await asyncio.to_thread(publisher.wait, 30)
    publisher.stdout.close()
    before = await world.count("thumbwheel_versions_deferred_total")
    ghost = CheckpointManifest(version=world.version(), role=POLICY, sequence=world.sequence)
    world.announce(ghost, "0" * 64)

    async def tried() -> bool:
        return await world.count("thumbwheel_versions_deferred_total") > before

    await until(tried)


SABOTAGES: dict[str, Callable[[World, int], object]] = {
    "torn": refused(torn),
    "wrong hash": refused(wrong_hash),
    "wrong shape": refused(wrong_shape),
    "not a number": refused(not_a_number),
    "other manifest": refused(other_manifest),
    "wrong probe": refused(wrong_probe),
    "store away": store_away,
    "publisher killed": publisher_killed,
}


async def server_killed(world: World, chosen: int) -> None:
    """kill -9 while a swap is under way: what is started next serves either version, whole."""
    async with world.quiet():
        manifest = world.publish(world.weights[chosen].folder, world.weights[chosen].probe)
        world.announce(manifest)
        world.process.kill()
        await asyncio.to_thread(world.process.start().wait_serving)
        await world.is_live(manifest.version)
    world.live = chosen
    world.report.kills += 1


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
        swapped = (await world.client.policy()).swaps
        world.report.pauses = [swap.pause_seconds for swap in swapped if swap.pause_seconds]
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
