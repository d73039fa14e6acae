"""Online learning with real parts: vLLM policy and reward services, a broker and the trainer, all processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.integration.trainer.test_trainer_process import comparison
from tests.support import Deployment, Process, free_port, until
from thumbwheel.client import AsyncClient
from thumbwheel.status import scrape
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.v1.rollout_pb2 import ModelRole

pytestmark = pytest.mark.timeout(600)
POLICY, REWARD = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD


async def test_rollouts_are_served_scored_and_learnt_and_a_dead_policy_only_delays_them(
    tmp_path: Path, processes: list[Process]
) -> None:
    """Each prompt is learnt once, though the policy service is killed while rollouts are wanted."""
    deployment = Deployment(tmp_path)
    deployment.publish(POLICY, 0, seed=0)
    deployment.publish(REWARD, 0, seed=1)
    with EmbeddedBroker(port=free_port(), log=tmp_path / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        common = ["--home", str(tmp_path), "--bootstrap-servers", broker.bootstrap_servers]
        engine = [*common, "--max-model-len", "512"]
        policy = Process("services.policy", engine, tmp_path / "policy.log")
        reward = Process("services.reward", engine, tmp_path / "reward.log")
        learning = ["--tasks", "policy", "--policy-objective", "ppo", "--round-size", "4", "--rollout-tokens", "16"]
        learning += ["--policy", policy.address, "--reward", reward.address, "--policy-learning-rate", "1e-6"]
        learning += ["--reward-pessimism", "0.5"]
        trainer = Process("trainer", [*common, *learning, "--max-wait-seconds", "600"], tmp_path / "trainer.log")
        processes += [policy, reward, trainer]
        for process in (policy, reward, trainer):
            process.start()
        for process in (policy, reward, trainer):
            process.wait_serving()
        producer = log.producer()

        def send(*numbers: int) -> None:
            for number in numbers:
                producer.send(topics.COMPARISONS, b"key", comparison(number).SerializeToString()).result(30)

        def published() -> list[str]:
            return [manifest.version for manifest in reversed(deployment.store.versions(POLICY))]

        async def live() -> bool:
            async with AsyncClient(policy=policy.address, timeout=5) as client:
                return (await client.policy()).version == "policy-000001"

        send(*range(4))
        await until(live, timeout=120)
        first = deployment.store.load("policy-000001").manifest
        assert (first.lineage.objective, first.lineage.reward_version) == ("ppo", "reward-000000")
        assert first.metrics["staleness"] == 0.0
        # What was served is what the trainer computes: ratios to the behaviour policy are 1, but for bf16.
        assert first.metrics["importance_weight"] == pytest.approx(1.0, abs=0.1)

        policy.kill()
        send(*range(4, 8))
        address = f"127.0.0.1:{trainer.metrics_port}"

        async def away() -> bool:
            found = await asyncio.to_thread(scrape, address)
            return found.total("thumbwheel_trainer_service_away", service="policy") == 1.0

        await until(away, timeout=60)
        gone = time.monotonic()
        assert published() == ["policy-000000", "policy-000001"]
        assert trainer.popen.poll() is None

        policy.start().wait_serving()

        async def second() -> bool:
            return published()[-1] == "policy-000002"

        await until(second, timeout=120)
        assert time.monotonic() - gone > 1.0
        learnt = [
            line
            for version in ("policy-000001", "policy-000002")
            for line in (deployment.store.load(version).path / "samples.txt").read_text().split()
        ]
        assert sorted(learnt) == [f"{comparison(number).comparison_id}/1" for number in range(8)]
        assert trainer.errors() == []
        assert trainer.stop() == 0
        producer.close(5)
        log.close()
