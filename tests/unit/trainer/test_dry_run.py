"""The plan says what is true, and nothing happens."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support import Deployment
from tests.unit.trainer.test_ingest import comparison
from thumbwheel.auth import ManifestSigner
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import DeadLetter
from trainer import dry_run, publish
from trainer.config import TrainerSettings

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_plan_of_both_tasks(policy_path: Path, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    publish.ensure_base(policy_path, deployment.store, ManifestSigner.load(tmp_path / "keys"))
    log = MemoryLog()
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    for number in range(5):
        log.producer().send(topics.COMPARISONS, b"key", comparison(number).SerializeToString()).result(1.0)
    log.producer().send(topics.COMPARISONS, b"key", b"\xff").result(1.0)
    settings = TrainerSettings(
        home=tmp_path,
        policy_objective="dpo+0.1*sft",
        pairs_from="both",
        round_size=4,
        batch_size=2,
        rollout_tokens=100,
        policy_learning_rate=2e-6,
    )
    lines = list(dry_run.plan(settings, deployment.store, log, threading.Event()))
    text = "\n".join(f"{about.strip()}: {said}" for about, said in lines)
    assert text.count("goes on from: policy-000000 after 0 rounds and 0 steps (no training checkpoint)") == 1
    assert "objective: dpo, weight 1: learns from comparisons" in text
    assert "objective: sft, weight 0.1: learns from demonstrations" in text
    assert text.count("waiting: 5 comparisons") == 2
    assert text.count("not usable: 1 records on the stream, which would become dead letters") == 2
    assert "rollouts: 4 of up to 100 tokens to each of 1 prompts by the policy at 127.0.0.1:50051" in text
    assert "next round: at once: 4 samples in 2 steps at learning rate 2e-06" in text
    assert [m.sequence for m in deployment.store.versions(deployment.store.load("policy-000000").manifest.role)] == [0]
    assert not settings.training_path.exists()
    assert not (tmp_path / "tensorboard").exists()
    letters = log.consumer([topics.DEADLETTER], group="test").poll(0.0)
    assert [DeadLetter.FromString(letter.value) for letter in letters] == []
    log.close()
