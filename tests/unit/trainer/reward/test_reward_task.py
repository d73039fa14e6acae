"""The reward model on the stream: watched from round to round, and a round that goes wrong is not published."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Deployment
from tests.unit.trainer.test_ingest import comparison
from tests.unit.trainer.test_task import rounds, send
from thumbwheel.auth import ManifestSigner
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from trainer import loop, metrics, publish
from trainer.config import TrainerSettings
from trainer.shared import Shared
from trainer.task import Task

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


def ties_alone(shared: Shared, **settings: object) -> Task:
    """A task that has read eight ties, and judged them to be no samples or eight."""
    log = MemoryLog(delivery_timeout=0.1)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    given = shared.settings.model_copy(update={"batch_size": 8, **settings})
    other = dataclasses.replace(shared, settings=given, log=log, producer=log.producer())
    for number in range(8):
        event = comparison(number)
        event.prompt_token_ids[0] += number
        event.tie = True
        other.producer.send(topics.COMPARISONS, b"key", event.SerializeToString()).result(1.0)
    task = Task("reward", other, resident=True)
    task.resume()
    task.ingest(1.0)
    return task


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_ties_on_the_stream_are_learnt_by_the_model_of_ties(ties: str, shared: Shared) -> None:
    """Version 0 finds all responses alike, so it gives a tie just the probability that the setting says."""
    task = ties_alone(shared, ties=ties, tie_rate=0.3)
    assert (task.waiting, task.due()) == (8, True)
    loop.turn(task)
    task.close()
    manifest = shared.store.load("reward-000001").manifest
    assert manifest.lineage.sample_count == 8
    assert manifest.lineage.settings["ties"] == ties
    assert manifest.metrics["loss"] == pytest.approx(-math.log(0.3), abs=1e-4)
    assert "accuracy" not in manifest.metrics, "nobody was right about a tie"


def test_without_a_model_of_ties_they_are_passed_over(shared: Shared) -> None:
    task = ties_alone(shared)
    assert (task.waiting, task.due()) == (0, False)
    task.close()
