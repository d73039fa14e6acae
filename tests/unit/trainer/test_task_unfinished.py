"""Rounds that did not come to their ends, and what a task makes of them when it is started again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import Deployment
from tests.unit.trainer.test_task import POLICY, announced, rounds, samples, send, shared
from thumbwheel.auth import ManifestSigner
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonState
from trainer import loop, publish
from trainer.background import Background
from trainer.checkpoint import TrainingCheckpoints
from trainer.shared import Shared
from trainer.task import Task
from trainer.team import Team

__all__ = ["shared"]
pytestmark = pytest.mark.usefixtures("one_rank")


def crash_before_the_checkpoint(shared: Shared, monkeypatch: pytest.MonkeyPatch, *, resident: bool) -> None:
    """A round whose version is published, and whose checkpoint never is."""
    task = Task("policy", shared, resident=resident)
    task.resume()
    task.ingest(1.0)
    with monkeypatch.context() as crash:
        crash.setattr(TrainingCheckpoints, "finish", lambda *_: (_ for _ in ()).throw(RuntimeError("kill -9")))
        with pytest.raises(RuntimeError, match="kill -9"), contextlib.closing(task):
            loop.turn(task)


def test_a_round_that_was_begun_is_learnt_again_from_the_same_samples_bit_for_bit(
    shared: Shared, tmp_path: Path
) -> None:
    """Whatever has come in since, and however large rounds are by now."""

    rounds(shared, 1)
    crashed = Task("policy", shared, resident=True)
    crashed.resume()
    crashed.ingest(1.0)
    begun = crashed.batch()
    crashed.learn(begun, lambda report: None)
    crashed.close()  # and nothing of the round is kept
    larger = dataclasses.replace(shared, settings=shared.settings.model_copy(update={"round_size": 7}))
    rounds(larger, 1)
    assert samples(shared, "policy-000002") == [4, 5, 6, 7] == [int(sample.id[-12:]) for sample in begun]
    found = load_file(shared.store.load("policy-000002").path / "model.safetensors")

    other = Deployment(tmp_path / "other")
    publish.ensure_base(shared.store.load("policy-000000").path, other.store, ManifestSigner.load(other.home / "keys"))
    log = MemoryLog(delivery_timeout=0.1)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    straight = dataclasses.replace(
        shared,
        settings=shared.settings.model_copy(update={"home": other.home}),
        store=other.store,
        signer=ManifestSigner.load(other.home / "keys"),
        log=log,
        producer=log.producer(),
    )
    for number in range(8):
        send(straight, number)
    rounds(straight, 2)
    expected = load_file(other.store.load("policy-000002").path / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    log.close()


def test_of_a_round_that_was_begun_what_was_taken_back_since_is_left_out(shared: Shared) -> None:
    def begun() -> list[int]:
        task = Task("policy", shared, resident=True)
        task.resume()
        task.ingest(1.0)
        assert task.due()
        found = [int(sample.id[-12:]) for sample in task.batch()]
        task.close()
        return found

    assert begun() == [0, 1, 2, 3]
    send(shared, 2, ComparisonState.COMPARISON_STATE_RETRACTED)
    assert begun() == [0, 1, 3]
    for number in (0, 1, 3):
        send(shared, number, ComparisonState.COMPARISON_STATE_RETRACTED)
    assert begun() == [4, 5, 6, 7]


@pytest.mark.parametrize("taken_back", [False, True])
def test_what_was_read_before_a_round_was_learnt_again_is_known_of_the_version_that_came_of_it(
    taken_back: bool, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that version never came to a checkpoint, and the round is learnt a third time."""
    begun = Task("policy", shared, resident=True)
    begun.resume()
    begun.ingest(1.0)
    assert [int(sample.id[-12:]) for sample in begun.batch()] == [0, 1, 2, 3]
    begun.close()
    if taken_back:
        send(shared, 2, ComparisonState.COMPARISON_STATE_RETRACTED)
    send(shared, 20)
    crash_before_the_checkpoint(shared, monkeypatch, resident=True)
    rounds(shared, 2)
    one, two = (shared.store.load(f"policy-00000{number}").manifest for number in (1, 2))
    assert samples(shared, one.version) == ([0, 1, 3] if taken_back else [0, 1, 2, 3])
    assert two.parent == one.version, "it was not learnt beside it once more"
    assert samples(shared, two.version) == [4, 5, 6, 7]
    ends = {part.partition: part.end for part in one.lineage.offsets}
    assert {part.partition: part.start for part in two.lineage.offsets} == ends, "nothing was read twice"


@pytest.mark.parametrize("resident", [True, False])
def test_a_version_whose_checkpoint_never_came_is_made_again_and_is_the_same(
    resident: bool, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds(shared, 1, resident=resident)
    crash_before_the_checkpoint(shared, monkeypatch, resident=resident)
    checkpoint = shared.settings.training_path / "policy" / "checkpoint-000002"
    assert (shared.store.root / "policy-000002").exists()
    assert not checkpoint.exists()
    send(shared, 5, ComparisonState.COMPARISON_STATE_RETRACTED)  # it has been learnt: the version is there
    rounds(shared, 1, resident=resident)
    weights = [folder / "model.safetensors" for folder in (checkpoint / "model", shared.store.root / "policy-000002")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rounds(shared, 1, resident=resident)
    assert [samples(shared, f"policy-00000{n}") for n in (2, 3)] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    third = shared.store.load("policy-000003").manifest
    assert third.parent == "policy-000002"
    assert [int(sample_id[-12:]) for sample_id in third.lineage.retracted_sample_ids] == [5]
    offsets = [shared.store.load(f"policy-00000{n}").manifest.lineage.offsets for n in (2, 3)]
    ends, starts = (
        {one.partition: getattr(one, edge) for one in of} for of, edge in zip(offsets, ("end", "start"), strict=True)
    )
    assert ends == starts, "nothing was read in between"


def test_also_the_first_version_is_made_again_where_its_checkpoint_never_came(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_before_the_checkpoint(shared, monkeypatch, resident=True)
    assert (shared.store.root / "policy-000001").exists()
    rounds(shared, 2)
    versions = shared.store.versions(POLICY)
    assert [(m.version, m.parent) for m in versions[:2]] == [
        ("policy-000002", "policy-000001"),
        ("policy-000001", "policy-000000"),
    ]
    assert [samples(shared, f"policy-00000{n}") for n in (1, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert versions[0].lineage.steps == 2


def test_a_damaged_checkpoint_is_made_again_from_the_one_before(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    rounds(shared, 2)
    newest = shared.settings.training_path / "policy" / "checkpoint-000002" / "state.json"
    newest.write_text(newest.read_text()[:20])
    with caplog.at_level(logging.ERROR):
        rounds(shared, 2)
    assert "state.json has 20 bytes instead of" in caplog.text
    parents = {m.version: m.parent for m in shared.store.versions(POLICY)}
    assert parents["policy-000003"] == "policy-000002"
    assert [samples(shared, f"policy-00000{n}") for n in (2, 3)] == [[4, 5, 6, 7], [8, 9, 10, 11]], "each once"


def test_names_are_used_once_where_it_is_not_known_any_more_what_a_round_learnt(shared: Shared) -> None:
    rounds(shared, 2)
    newest = shared.settings.training_path / "policy" / "checkpoint-000002" / "state.json"
    newest.write_text(newest.read_text()[:20])
    shutil.rmtree(shared.settings.training_path / "policy" / "round-000002")
    rounds(shared, 2)
    # Version 2 stays as it was; what was learnt in it is learnt again beside it, from version 1.
    parents = {m.version: m.parent for m in shared.store.versions(POLICY)}
    assert parents["policy-000003"] == "policy-000001"
    assert parents["policy-000004"] == "policy-000003"
    assert samples(shared, "policy-000002") == samples(shared, "policy-000003") == [4, 5, 6, 7]
    assert samples(shared, "policy-000004") == [8, 9, 10, 11]


def test_a_broker_that_is_away_keeps_no_checkpoint_from_being_finished(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the version is announced when it is back."""
    monkeypatch.setattr("trainer.task._ANNOUNCE_SECONDS", 0.05)
    monkeypatch.setattr(publish, "_FIRST_RETRY_SECONDS", 0.01)
    finished = threading.Event()
    finish = TrainingCheckpoints.finish

    def noticed(*arguments: Any) -> Path:
        folder = finish(*arguments)
        finished.set()
        return folder

    monkeypatch.setattr(TrainingCheckpoints, "finish", noticed)
    assert isinstance(shared.log, MemoryLog)
    task = Task("policy", shared, resident=True)
    task.resume()
    task.ingest(1.0)
    shared.log.stop()
    loop.turn(task)
    assert finished.wait(20.0)
    assert (shared.settings.training_path / "policy" / "checkpoint-000001" / "index.json").exists()
    shared.log.start()
    task.close()  # waits for what is done in the background
    assert announced(shared)[-1] == "policy-000001"


@pytest.mark.parametrize(("resident", "grace"), [(True, 3.0), (False, 0.0)])
def test_servers_have_a_moment_for_the_version_where_no_other_task_waits_for_its_turn(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, *, resident: bool, grace: float
) -> None:
    given: list[float] = []
    save = Team.save

    def noted(team: Team, folder: Path, model: Path, grace: float) -> Background:
        given.append(grace)
        return save(team, folder, model, grace)

    monkeypatch.setattr(Team, "save", noted)
    rounds(shared, 1, resident=resident)
    assert given == [grace]
