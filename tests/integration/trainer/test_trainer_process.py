"""The trainer as a process, on a real broker: comparisons go in, signed versions come out, kill -9 or not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import uuid_utils

from tests.support import Deployment, Process, make_tiny_llama, until
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, DeadLetter, VersionEvent
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, VersionState

POLICY, REWARD = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)


@pytest.fixture(scope="module")
def begun(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with keys and version 0 of both roles, made as `thumbwheel up` makes it."""
    home = tmp_path_factory.mktemp("begun") / "home"
    Deployment(home)
    command = [sys.executable, "-m", "trainer", "--init-only", "--base-model", str(base_model), "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(begun: Path, tmp_path: Path) -> Path:
    """A home folder of this test."""
    return shutil.copytree(begun, tmp_path / "home")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker with the topics that the collector makes beside those that the trainer makes."""
    with EmbeddedBroker(port=0, log=tmp_path / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        log.close()
        yield broker


def trainer(
    home: Path, broker: EmbeddedBroker, processes: list[Process], *flags: str, torchrun: bool = False
) -> Process:
    arguments = ["--home", str(home), "--bootstrap-servers", broker.bootstrap_servers, "--threads", "1"]
    arguments += ["--round-size", "6", "--batch-size", "3", "--policy-learning-rate", "1e-3", *flags]
    module = "trainer"
    if torchrun:
        # As `torchrun -m trainer` does.
        module, arguments = "torch.distributed.run", ["--standalone", "--nproc-per-node", "1", "-m", module, *arguments]
    process = Process(module, arguments, home / "trainer.log")
    processes.append(process)
    return process.start()


def comparison(
    number: int, state: ComparisonState.ValueType = ComparisonState.COMPARISON_STATE_ACCEPTED
) -> ComparisonEvent:
    """Comparison `number`: its id and its content follow from the number."""
    event = ComparisonEvent(
        event_id=str(uuid_utils.uuid7()),
        comparison_id=f"01890000-0000-7000-8000-{number:012d}",
        state=state,
        prompt_id=f"01890000-0000-7000-9000-{number:012d}",
        prompt_token_ids=[1, *(10 + (number + i) % 200 for i in range(8)), 2],
        weight=1.0,
    )
    event.chosen.text, event.rejected.text = f"yes {number}", f"no, never {number}"
    event.chosen.token_ids.extend([20 + number % 100, 30, 31, 2])
    event.rejected.token_ids.extend([40 + number % 100, 50, 51, 52, 53, 2])
    event.chosen.spans.add(version="policy-000000", start=0, end=4)
    event.received_at.GetCurrentTime()
    return event


def ids(numbers: Sequence[int]) -> list[str]:
    return [comparison(number).comparison_id for number in numbers]


def send(log: Log, events: Sequence[ComparisonEvent | bytes]) -> None:
    producer = log.producer()
    for event in events:
        value = event if isinstance(event, bytes) else event.SerializeToString()
        key = b"raw" if isinstance(event, bytes) else event.prompt_id.encode()
        producer.send(topics.COMPARISONS, key, value)
    producer.flush(20.0)
    producer.close(5.0)


class Topic:
    """Everything a topic holds, as it comes in."""

    def __init__(self, log: Log, name: str) -> None:
        self._consumer = log.consumer([name], group="test")
        self.values: list[bytes] = []

    def wait_for(self, count: int, timeout: float = 60.0) -> list[bytes]:
        deadline = time.monotonic() + timeout
        while len(self.values) < count:
            assert time.monotonic() < deadline, f"{len(self.values)} of {count} records in {timeout} s"
            self.values += [record.value for record in self._consumer.poll(0.5)]
        return self.values

    def close(self) -> None:
        self._consumer.close()


def announced(values: Sequence[bytes]) -> list[str]:
    return [VersionEvent.FromString(value).version for value in values]


def samples(home: Path, version: str) -> list[str]:
    return (Deployment(home).store.load(version).path / "samples.txt").read_text().split()


def metric(process: Process, line: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line + " ")), -1.0)


@pytest.mark.timeout(240)
def test_comparisons_become_versions_of_both_roles(
    home: Path, broker: EmbeddedBroker, processes: list[Process]
) -> None:
    log = open_log(broker.bootstrap_servers)
    process = trainer(home, broker, processes).wait_serving()
    versions, letters = Topic(log, topics.VERSIONS), Topic(log, topics.DEADLETTER)
    assert sorted(announced(versions.wait_for(2))) == ["policy-000000", "reward-000000"]

    same = comparison(7)
    same.rejected.CopyFrom(same.chosen)
    first = [comparison(number) for number in range(5)]
    send(log, [*first, b"\xff not a message", same, *first, comparison(5)])
    assert sorted(announced(versions.wait_for(4))[2:]) == ["policy-000001", "reward-000001"]
    send(log, [comparison(n) for n in range(6, 12) if n != 7] + [comparison(12), comparison(13)])
    assert sorted(announced(versions.wait_for(6))[4:]) == ["policy-000002", "reward-000002"]

    store = Deployment(home).store
    for role, name in ((POLICY, "policy"), (REWARD, "reward")):
        newest, middle, base = (store.load(m.version) for m in store.versions(role))
        assert samples(home, f"{name}-000001") == ids(range(6))
        assert samples(home, f"{name}-000002") == ids([6, 8, 9, 10, 11, 12])
        assert [v.manifest.parent for v in (newest, middle, base)] == [f"{name}-000001", f"{name}-000000", ""]
        lineage = newest.manifest.lineage
        assert (lineage.sample_count, lineage.steps) == (6, 4)
        assert (lineage.offsets[0].start, lineage.offsets[0].end) == (13, 20)
        assert lineage.reference_version == ("policy-000000" if role == POLICY else "")
        assert lineage.settings["batch_size"] == "3"
        assert {file.path for file in base.manifest.files} <= {file.path for file in newest.manifest.files}
        assert not _same_weights(newest.path, middle.path)
    assert {DeadLetter.FromString(v).offset for v in letters.wait_for(4)} == {5, 6}
    assert {DeadLetter.FromString(v).consumer for v in letters.values} == {"trainer-policy", "trainer-reward"}
    assert any("nothing to learn" in DeadLetter.FromString(v).reason for v in letters.values)
    event = VersionEvent.FromString(versions.values[-1])
    assert event.state == VersionState.VERSION_STATE_STABLE
    assert event.manifest_sha256 == store.load(event.version).manifest_sha256

    assert metric(process, 'thumbwheel_trainer_samples_learnt_total{task="policy"}') == 12
    assert metric(process, 'thumbwheel_trainer_pending_samples{task="reward"}') == 1
    assert metric(process, 'thumbwheel_trainer_published_version{task="policy"}') == 2
    assert metric(process, 'thumbwheel_trainer_feedback_to_publish_seconds_count{task="policy"}') == 12
    _check_probe(store.load("policy-000002").path, store.load("policy-000002").manifest)
    assert process.stop() == 0
    assert process.errors() == ["record given up"] * 4
    versions.close()
    letters.close()
    log.close()


@pytest.mark.timeout(240)
async def test_killed_while_it_publishes_it_makes_the_same_version_and_learns_nothing_twice(
    home: Path, broker: EmbeddedBroker, processes: list[Process]
) -> None:
    log = open_log(broker.bootstrap_servers)
    training = home / "trainer" / "policy"
    # Where the store looks for leftovers there is a pipe that nobody writes to: opening it hangs, as a dead disk would.
    pipe = home / "store" / ".staging" / "pipe"
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    process = trainer(home, broker, processes, "--tasks", "policy").wait_serving()
    versions = Topic(log, topics.VERSIONS)
    send(log, [comparison(number) for number in range(8)])
    await until(_is_there(training / ".staging" / "rank-00000.safetensors"))
    process.kill()
    assert not (home / "store" / "policy-000001").exists()
    assert not (training / "checkpoint-000001").exists(), "a version comes first"

    pipe.unlink()
    send(log, [comparison(number) for number in range(4, 12)])
    process = trainer(home, broker, processes, "--tasks", "policy", torchrun=True).wait_serving()
    # Version 0 from both starts; what had been written down; and what came after.
    assert announced(versions.wait_for(4)) == ["policy-000000", "policy-000000", "policy-000001", "policy-000002"]
    assert samples(home, "policy-000001") == ids(range(6))
    assert samples(home, "policy-000002") == ids(range(6, 12))
    second = Deployment(home).store.load("policy-000002").manifest
    assert second.parent == "policy-000001"
    assert second.lineage.steps == 4
    process.kill()
    versions.close()
    log.close()


@pytest.mark.timeout(240)
async def test_asked_to_stop_within_a_round_it_ends_at_once_and_learns_it_the_next_time(
    home: Path, broker: EmbeddedBroker, processes: list[Process]
) -> None:
    log = open_log(broker.bootstrap_servers)
    process = trainer(home, broker, processes, "--tasks", "policy", "--epochs", "100000").wait_serving()
    send(log, [comparison(number) for number in range(6)])
    await until(_metric_is(process, 'thumbwheel_trainer_grad_norm{task="policy"}', 1e-9))
    assert process.stop(timeout=20.0) == 0
    assert process.errors() == []
    assert not list((home / "trainer").rglob("checkpoint-*"))
    process = trainer(home, broker, processes, "--tasks", "policy").wait_serving()
    versions = Topic(log, topics.VERSIONS)
    assert announced(versions.wait_for(3)) == ["policy-000000", "policy-000000", "policy-000001"]
    assert samples(home, "policy-000001") == ids(range(6))
    assert process.stop() == 0
    versions.close()
    log.close()


@pytest.mark.timeout(240)
async def test_ended_while_the_broker_is_away_it_announces_later_and_learns_nothing_twice(
    home: Path, tmp_path: Path, processes: list[Process]
) -> None:
    flags = ("--tasks", "policy", "--min-round-size", "5", "--max-wait-seconds", "3")
    with EmbeddedBroker(port=0, log=tmp_path / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        process = trainer(home, broker, processes, *flags).wait_serving()
        send(log, [comparison(number) for number in range(5)])
        await until(_metric_is(process, 'thumbwheel_trainer_pending_samples{task="policy"}', 5))
        log.close()
    # The broker is gone before the round begins, which needs it for nothing but the announcement.
    await until(_is_there(home / "store" / "policy-000001"))
    assert process.stop() == 0
    assert samples(home, "policy-000001") == ids(range(5))

    # The new broker knows nothing; the collector publishes everything again, and some more.
    with EmbeddedBroker(port=broker.port, log=tmp_path / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        retracted = [comparison(n, ComparisonState.COMPARISON_STATE_RETRACTED) for n in (1, 9)]
        send(log, [*(comparison(number) for number in (*range(4, -1, -1), *range(5, 10))), *retracted, comparison(10)])
        versions = Topic(log, topics.VERSIONS)
        process = trainer(home, broker, processes, *flags).wait_serving()
        assert announced(versions.wait_for(2)) == ["policy-000001", "policy-000002"]
        assert samples(home, "policy-000002") == ids([5, 6, 7, 8, 10])
        lineage = Deployment(home).store.load("policy-000002").manifest.lineage
        assert list(lineage.retracted_sample_ids) == ids([1])
        assert (lineage.offsets[0].start, lineage.offsets[0].end) == (0, 13)
        assert process.stop() == 0
        versions.close()
        log.close()


def test_without_version_0_it_says_what_to_type(tmp_path: Path, broker: EmbeddedBroker) -> None:
    home = tmp_path / "empty"
    Deployment(home)
    arguments = ["--home", str(home), "--bootstrap-servers", broker.bootstrap_servers, "--listen", "127.0.0.1:0"]
    command = [sys.executable, "-m", "trainer", *arguments, "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["message"].startswith("There is no policy-000000 in ")
    assert last["message"].endswith("Type `python -m trainer --init-only` first.")


def _is_there(path: Path) -> Callable[[], Awaitable[bool]]:
    return lambda: asyncio.to_thread(path.exists)


def _metric_is(process: Process, line: str, value: float) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return await asyncio.to_thread(metric, process, line) >= value

    return reached


def _same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def _check_probe(path: Path, manifest: CheckpointManifest) -> None:
    from transformers import AutoModelForCausalLM

    (probe,) = manifest.probes
    prompt, continuation = list(probe.prompt_token_ids), list(probe.token_ids)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + continuation])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    found = logprobs.gather(1, torch.tensor(continuation)[:, None]).squeeze(1)
    torch.testing.assert_close(found, torch.tensor(list(probe.logprobs)), rtol=0.03, atol=0.1)
