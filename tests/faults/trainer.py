"""Kills the trainer at random instants while it learns; a checker decides from stream and manifests what was learnt.

    python -m tests.faults.trainer --kills 100 --seed 1

Episodes of some kills each, with one rank and with two, which die together as `torchrun` has it. In every second one
feedback comes in meanwhile, with duplicates, retractions and records that are no records; in the others all of it is
there from the start, and then every version has to have the very weights, by the hash in its manifest, of a run that
nobody disturbed. The schedule of an episode follows from its seed. The last line is one JSON object; the status is 1
where anything was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import synchronize
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.trainer_checker import Event, Version, violations
from tests.support import Deployment, free_port, make_tiny_llama
from tests.unit.trainer.test_ingest import comparison
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.kafka_client import client, kafka
from thumbwheel.stream.log import Producer
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import runtime

KILLS_AN_EPISODE = 10
ROUND_SIZE = 4
SETTLE_SECONDS = 180.0
_PRELOAD = ["trainer.loop", "trainer.task", "trainer.team", "thumbwheel.serving", "thumbwheel.stream.kafka"]


@dataclass(frozen=True, slots=True)
class Episode:
    """What one episode came to."""

    seed: int
    ranks: int
    live: bool
    kills: int
    versions: int
    learnt: int
    violations: Sequence[str]
    seconds: float


def trainer_process(
    arguments: Sequence[str], rank: int, ranks: int, port: int, log: Path, heeds: synchronize.Event
) -> None:
    """A rank of the trainer, in a process of its own; sets `heeds` once it heeds SIGTERM."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    from thumbwheel import telemetry
    from trainer import __main__ as process
    from trainer.config import TrainerSettings

    sys.argv[1:] = arguments
    settings = TrainerSettings.from_command_line(prog="python -m trainer")
    telemetry.setup_logging("trainer", settings.log_level)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    heeds.set()
    process.main(settings, stop)


@dataclass
class Trainer:
    """The trainer of a home folder, that can be started and killed."""

    home: Path
    broker: EmbeddedBroker
    ranks: int
    processes: list[BaseProcess] = field(default_factory=list)
    heeding: list[synchronize.Event] = field(default_factory=list)

    def start(self, *more: str) -> None:
        """Starts all ranks."""
        arguments = ["--home", str(self.home), "--bootstrap-servers", self.broker.bootstrap_servers, "--threads", "1"]
        arguments += ["--listen", f"127.0.0.1:{free_port()}", "--metrics-port", str(free_port()), "--tasks", "policy"]
        arguments += ["--round-size", str(ROUND_SIZE), "--batch-size", "2", "--policy-learning-rate", "1e-3"]
        arguments += ["--zero-stage", "2" if self.ranks > 1 else "0", *more]
        context, port = multiprocessing.get_context("forkserver"), free_port()
        self.heeding = [context.Event() for _ in range(self.ranks)]
        self.processes = [
            context.Process(
                target=trainer_process,
                args=(arguments, rank, self.ranks, port, self.home / f"trainer-{rank}.log", heeds),
            )
            for rank, heeds in enumerate(self.heeding)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """kill -9 of all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10.0)

    def stop(self) -> list[int | None]:
        """SIGTERM, once they heed it; returns how they ended."""
        for process, heeds in zip(self.processes, self.heeding, strict=True):
            heeds.wait(60.0)
            process.terminate()
        for process in self.processes:
            process.join(60.0)
        return [process.exitcode for process in self.processes]

    @property
    def died(self) -> bool:
        """Whether a rank ended though nobody killed it."""
        return any(process.exitcode is not None for process in self.processes)


def event(number: int, state: ComparisonState.ValueType = ComparisonState.COMPARISON_STATE_ACCEPTED) -> ComparisonEvent:
    """Comparison `number`, in a state."""
    made = comparison(number)
    made.prompt_token_ids[0] += number % 100
    made.state = state
    return made


class Stream:
    """What is sent to the comparisons topic."""

    def __init__(self, producer: Producer, draw: random.Random, *, live: bool) -> None:
        self._producer, self._draw, self._live = producer, draw, live
        self.sent = 0

    def send(self, count: int) -> None:
        """So many comparisons; where it is live, with all that may come beside them."""
        for _ in range(count):
            self._put(event(self.sent).SerializeToString())
            self.sent += 1
            if not self._live:
                continue
            if self._draw.random() < 0.2:
                self._put(event(self._draw.randrange(self.sent)).SerializeToString())  # once more
            if self._draw.random() < 0.1:
                self._put(b"\xff\xfe no record")
            if self._draw.random() < 0.1:
                taken = event(self._draw.randrange(self.sent), ComparisonState.COMPARISON_STATE_RETRACTED)
                self._put(taken.SerializeToString())
        self._producer.flush(20.0)

    def _put(self, value: bytes) -> None:
        self._producer.send(topics.COMPARISONS, b"key", value)


def read_stream(servers: str) -> list[Event]:
    """The comparisons topic as it lies there; nothing of ours reads."""
    consumer = client(kafka.KafkaConsumer, bootstrap_servers=servers, group_id=None, enable_auto_commit=False)
    with contextlib.closing(consumer):
        partition = kafka.TopicPartition(topics.COMPARISONS, 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        end, found, at = consumer.end_offsets([partition])[partition], list[Event](), 0
        while at < end:
            for records in consumer.poll(timeout_ms=500, max_records=5_000).values():
                for record in records:
                    with contextlib.suppress(Exception):  # what is no record is no event
                        read = ComparisonEvent.FromString(record.value)
                        retracted = read.state == ComparisonState.COMPARISON_STATE_RETRACTED
                        found.append(Event(record.offset, read.comparison_id, "retracted" if retracted else "accepted"))
            at = consumer.position(partition)
    return found


def read_versions(home: Path) -> list[Version]:
    """All versions of the policy."""
    found = []
    store = Deployment(home).store
    for manifest in store.versions(ModelRole.MODEL_ROLE_POLICY):
        samples = store.root / manifest.version / "samples.txt"
        offsets = [part for part in manifest.lineage.offsets if part.topic == topics.COMPARISONS]
        found.append(
            Version(
                manifest.version,
                manifest.parent,
                samples.read_text().split() if samples.exists() else (),
                manifest.lineage.sample_count,
                manifest.lineage.samples_sha256,
                list(manifest.lineage.retracted_sample_ids),
                offsets[0].start if offsets else 0,
                offsets[0].end if offsets else 0,
                next(file.sha256 for file in manifest.files if file.path == "model.safetensors"),
            )
        )
    return found


@contextlib.contextmanager
def deployment(begun: Path, home: Path, ranks: int) -> Iterator[tuple[Trainer, Producer]]:
    """A trainer with a broker of its own, from the same base model as all."""
    shutil.copytree(begun, home)
    with EmbeddedBroker(port=free_port(), log=home / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        producer, trainer = log.producer(), Trainer(home, broker, ranks)
        try:
            yield trainer, producer
        finally:
            trainer.kill()
            producer.close(5.0)
            log.close()


def settle(trainer: Trainer, wanted: int) -> None:
    """Waits until the newest version has read all that was sent and nothing waits. Raises TimeoutError."""
    trainer.start("--min-round-size", "1", "--max-wait-seconds", "2")
    _await_versions(trainer, wanted)
    status = trainer.stop()
    assert status == [0] * trainer.ranks, f"the trainer ended with {status} after it had settled"


def _await_versions(trainer: Trainer, wanted: int) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while sum(len(version.samples) for version in read_versions(trainer.home)) < wanted:
        if trainer.died or time.monotonic() > deadline:
            log = (trainer.home / "trainer-0.log").read_text()
            raise TimeoutError(f"not all was learnt; the trainer's log ends:\n{log[-3000:]}")
        time.sleep(0.2)


def run_episode(begun: Path, seed: int, kills: int, ranks: int, *, live: bool) -> Episode:
    """Some kills on a new deployment, and the verdict."""
    draw, started = random.Random(seed), time.monotonic()
    total = ROUND_SIZE * max(3, kills)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        home = Path(made, "home")
        with deployment(begun, home, ranks) as (trainer, producer):
            stream = Stream(producer, random.Random(draw.random()), live=live)
            stream.send(total if not live else ROUND_SIZE)
            for _ in range(kills):
                trainer.start()
                time.sleep(draw.uniform(0.3, 4.0))
                if trainer.died:
                    wrong.append(f"the trainer died by itself: {(home / 'trainer-0.log').read_text()[-1500:]}")
                trainer.kill()
                if live:
                    stream.send(draw.randrange(ROUND_SIZE // 2, 2 * ROUND_SIZE))
            events = read_stream(trainer.broker.bootstrap_servers)
            settle(trainer, _to_be_learnt(events, read_versions(home)))
            versions = read_versions(home)
            wrong += violations(events, versions)
        if not live:
            wrong += _unlike(versions, undisturbed(begun, Path(made, "undisturbed"), ranks, total))
    learnt = sum(len(version.samples) for version in versions)
    return Episode(seed, ranks, live, kills, len(versions) - 1, learnt, wrong, time.monotonic() - started)


def _to_be_learnt(events: Sequence[Event], versions: Sequence[Version]) -> int:
    """How many ids versions have to have in the end: all that stand, and those that were learnt before they fell."""
    accepted = {event.id for event in events if event.state == "accepted"}
    retracted = {event.id for event in events if event.state == "retracted"}
    learnt = {id for version in versions for id in version.samples}
    return len(accepted - retracted | learnt)


_undisturbed: dict[tuple[int, int], list[Version]] = {}


def undisturbed(begun: Path, home: Path, ranks: int, total: int) -> list[Version]:
    """The versions of a run that nobody killed."""
    if (ranks, total) not in _undisturbed:
        with deployment(begun, home, ranks) as (trainer, producer):
            Stream(producer, random.Random(0), live=False).send(total)
            settle(trainer, total)
            _undisturbed[ranks, total] = read_versions(home)
    return _undisturbed[ranks, total]


def _unlike(found: Sequence[Version], expected: Sequence[Version]) -> Iterator[str]:
    """What a disturbed run has otherwise than one that was not; weights by their hashes."""
    if [version.name for version in found] != [version.name for version in expected]:
        yield f"there are {len(found)} versions, and {len(expected)} without kills"
    for one, other in zip(found, expected, strict=False):
        if sorted(one.samples) != sorted(other.samples):
            yield f"{one.name} learnt from other samples than without kills"
        if one.weights_sha256 != other.weights_sha256:
            yield f"{one.name} has other weights than without kills"


def begin(folder: Path) -> Path:
    """A home folder with keys and version 0 of both roles, and what all processes begin from loaded once."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    runtime.before_imports(beside_servers=True)
    multiprocessing.set_forkserver_preload(_PRELOAD)
    from thumbwheel.auth import ManifestSigner
    from trainer import publish

    made = Deployment(folder / "begun")
    runtime.quiet_transformers()
    model = make_tiny_llama(folder / "tiny-llama", seed=0)
    publish.ensure_base(model, made.store, ManifestSigner.load(made.home / "keys"))
    return made.home


def run(kills: int, seed: int) -> list[Episode]:
    """Episodes until there were so many kills. Says what each came to."""
    episodes: list[Episode] = []
    with tempfile.TemporaryDirectory() as folder:
        begun = begin(Path(folder))
        while kills > 0:
            number, place = min(kills, KILLS_AN_EPISODE), len(episodes)
            made = run_episode(begun, seed + place, number, 1 + place // 2 % 2, live=place % 2 == 0)
            print(
                f"--seed {made.seed}: {made.kills} kills of {made.ranks} rank(s), {'live' if made.live else 'alike'}: "
                f"{made.versions} versions of {made.learnt} samples in {made.seconds:.0f} s",
                *(f"  WRONG: {violation}" for violation in made.violations),
                sep="\n",
                flush=True,
            )
            episodes.append(made)
            kills -= number
    return episodes


def main() -> int:
    """Parses the arguments, runs, and says how it went."""
    parser = argparse.ArgumentParser(prog="make faults-trainer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=120, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first episode; the next take the next")
    given = parser.parse_args()
    episodes = run(given.kills, given.seed)
    wrong = sum(len(episode.violations) for episode in episodes)
    line = {
        "faults": "trainer",
        "seed": given.seed,
        "kills": sum(episode.kills for episode in episodes),
        "kills_of_two_ranks": sum(episode.kills for episode in episodes if episode.ranks == 2),
        "versions": sum(episode.versions for episode in episodes),
        "learnt": sum(episode.learnt for episode in episodes),
        "violations": wrong,
    }
    print(json.dumps(line))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
