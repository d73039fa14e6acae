"""A policy service on a tiny model that follows a broker: what its tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import Deployment, Process, announce, free_port
from thumbwheel.client import AsyncClient
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log, Producer
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

POLICY = ModelRole.MODEL_ROLE_POLICY
GREEDY = pb.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass
class World:
    """A broker, a store, and a policy service that follows it."""

    deployment: Deployment
    bootstrap_servers: str
    log: Log
    producer: Producer
    process: Process

    def another(self, processes: list[Process], name: str, deployment: Deployment | None = None) -> Process:
        """A policy process not yet started, for the same broker."""
        home = (deployment or self.deployment).home
        return policy_process(processes, home, self.bootstrap_servers, name)

    def go_live(self, manifest: CheckpointManifest) -> None:
        """Announces a version."""
        announce(self.producer, manifest, self.deployment.store.load(manifest.version).manifest_sha256)


def policy_process(processes: list[Process], home: Path, bootstrap_servers: str, name: str) -> Process:
    """A policy process not yet started. It takes part in `processes`, which are killed in the end."""
    arguments = ["--home", str(home), "--bootstrap-servers", bootstrap_servers, "--max-model-len", "2048"]
    process = Process("services.policy", [*arguments, "--max-tokens", "1900"], home / f"{name}.log")
    processes.append(process)
    return process


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, processes: list[Process]) -> Iterator[World]:
    """Policy-000000 is live."""
    deployment = Deployment(tmp_path_factory.mktemp("home"))
    deployment.publish(POLICY, 0, seed=0)
    with EmbeddedBroker(port=free_port(), log=deployment.home / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=2, replication=1), 30.0)
        producer = log.producer()
        process = policy_process(processes, deployment.home, broker.bootstrap_servers, "policy").start().wait_serving()
        yield World(deployment, broker.bootstrap_servers, log, producer, process)
        producer.close(5)
        log.close()


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncClient]:
    """Talks to the service."""
    async with AsyncClient(policy=world.process.address, timeout=60.0) as client:
        yield client
