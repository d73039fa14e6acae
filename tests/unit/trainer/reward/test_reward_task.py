"""The reward model on the stream: watched from round to round, and a round that goes wrong is not published."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Deployment
from tests.unit.trainer.test_task import rounds, send
from thumbwheel.auth import ManifestSigner
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from trainer import loop, metrics, publish
from trainer.config import TrainerSettings
from trainer.task import Shared, Task

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def shared(policy_path: Path, tmp_path: Path) -> Iterator[Shared]:
    """A deployment with version 0 and a stream with 24 comparisons."""
    deployment = Deployment(tmp_path)
    signer = ManifestSigner.load(tmp_path / "keys")
    publish.ensure_base(policy_path, deployment.store, signer)
    log = MemoryLog(delivery_timeout=0.1)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    settings = TrainerSettings(home=tmp_path, round_size=8, reward_learning_rate=1e-3)
    shared = Shared(settings, log, log.producer(), deployment.store, signer, threading.Event())
    for number in range(24):
        send(shared, number)
    yield shared
    log.close()


def test_comparisons_are_judged_before_they_are_learnt_also_after_a_restart(shared: Shared) -> None:
    rounds(shared, 2, name="reward")
    assert "fresh_pairs" not in shared.store.load("reward-000002").manifest.metrics  # 16 are too few
    rounds(shared, 1, name="reward")
    measured = shared.store.load("reward-000003").manifest.metrics
    assert measured["fresh_pairs"] == 24
    assert 0 <= measured["fresh_accuracy"] <= 1
    assert measured["temperature"] > 0


def test_a_round_that_goes_wrong_keeps_the_last_good_version_and_says_so(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    rounds(shared, 1, name="reward")
    good = shared.store.load("reward-000001").manifest_sha256
    wild = shared.settings.model_copy(update={"reward_learning_rate": 1e30, "batch_size": 2, "max_grad_norm": 1e30})
    task = Task("reward", dataclasses.replace(shared, settings=wild), resident=True)
    task.resume()
    task.ingest(1.0)
    loop.turn(task)
    assert metrics.HALTED.labels("reward", "not_finite")._value.get() == 1
    assert "is not published, and the last version stays as it is" in caplog.text
    assert not task.due()
    task.close()
    newest = shared.store.versions(shared.store.load("reward-000001").manifest.role)[0]
    assert (newest.version, shared.store.load(newest.version).manifest_sha256) == ("reward-000001", good)
