"""What a task is after whatever happened to it: restarts, lost and damaged checkpoints, a broker that is away."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from safetensors.torch import load_file

from tests.support import Deployment
from tests.unit.trainer.test_ingest import comparison
from thumbwheel import errors, tracing
from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints import delta
from thumbwheel.checkpoints.store import SAMPLES
from thumbwheel.stream import topics
from thumbwheel.stream.log import Headers
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonState, VersionEvent
from thumbwheel.v1.rollout_pb2 import ModelRole, VersionState
from trainer import loop, publish, runtime
from trainer.config import TaskName, TrainerSettings
from trainer.models import load_causal, load_scorer, sequence_score
from trainer.shared import Shared
from trainer.task import Task

pytestmark = pytest.mark.usefixtures("one_rank")

POLICY = ModelRole.MODEL_ROLE_POLICY


@pytest.fixture
def shared(policy_path: Path, tmp_path: Path) -> Iterator[Shared]:
    """A deployment with version 0 of both roles and a stream with 12 comparisons."""
    deployment = Deployment(tmp_path)
    signer = ManifestSigner.load(tmp_path / "keys")
    publish.ensure_base(policy_path, deployment.store, signer)
    log = MemoryLog(delivery_timeout=0.1)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    settings = TrainerSettings(home=tmp_path, round_size=4, policy_learning_rate=1e-3, reward_learning_rate=1e-3)
    shared = Shared(settings, log, log.producer(), deployment.store, signer, threading.Event())
    for number in range(12):
        send(shared, number)
    yield shared
    log.close()


def send(shared: Shared, number: int, state: ComparisonState.ValueType | None = None, headers: Headers = ()) -> None:
    event = comparison(number)
    event.prompt_token_ids[0] += number
    event.state = state or event.state
    shared.producer.send(topics.COMPARISONS, b"key", event.SerializeToString(), headers).result(1.0)


def rounds(shared: Shared, count: int, *, name: TaskName = "policy", resident: bool = True) -> None:
    """A process that learns `count` rounds and ends."""
    task = Task(name, shared, resident=resident)
    task.resume()
    for _ in range(count):
        task.ingest(1.0)
        assert task.due()
        loop.turn(task)
    task.close()


def samples(shared: Shared, version: str) -> list[int]:
    return [int(sample_id[-12:]) for sample_id in shared.store.read(version, SAMPLES).decode().split()]


def announced(shared: Shared) -> list[str]:
    records = shared.log.consumer([topics.VERSIONS], group="test").poll(0.0)
    return [VersionEvent.FromString(record.value).version for record in records]


def test_version_0_is_the_base_model_and_a_scorer_without_opinion(shared: Shared, policy_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    policy, reward = shared.store.load("policy-000000"), shared.store.load("reward-000000")
    base = load_file(policy_path / "model.safetensors")
    found = load_file(policy.path / "model.safetensors")
    assert base.keys() == found.keys()
    assert all(torch.equal(base[name], found[name]) for name in base)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward.path)
    assert scorer.config.architectures == ["LlamaForSequenceClassification"]
    assert scorer.config.num_labels == 1
    with torch.no_grad():
        assert scorer(torch.tensor([[1, 5, 9, 2]])).logits.tolist() == [[0.0]]
    assert len(policy.manifest.probes[0].logprobs) == len(policy.manifest.probes[0].token_ids) > 0
    assert publish.ensure_base(policy_path, shared.store, shared.signer) == []


def test_no_base_model_is_an_error_that_says_what_to_type(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    with pytest.raises(errors.MissingModel, match=r"no model in .*nowhere. Type `thumbwheel model fetch`"):
        publish.ensure_base(tmp_path / "nowhere", deployment.store, ManifestSigner.load(tmp_path / "keys"))


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_taking_turns_and_restarting_change_no_bit(name: TaskName, shared: Shared, tmp_path: Path) -> None:
    """Three rounds in one process, against a process a round whose learner is freed between rounds."""
    import torch

    rounds(shared, 3, name=name)
    straight = load_file(shared.store.load(f"{name}-000003").path / "model.safetensors")

    other = Deployment(tmp_path / "other")
    publish.ensure_base(shared.store.load("policy-000000").path, other.store, ManifestSigner.load(other.home / "keys"))
    again = dataclasses.replace(
        shared,
        settings=shared.settings.model_copy(update={"home": other.home}),
        store=other.store,
        signer=ManifestSigner.load(other.home / "keys"),
    )
    for _ in range(3):
        rounds(again, 1, name=name, resident=False)
    restarted = load_file(other.store.load(f"{name}-000003").path / "model.safetensors")
    assert straight.keys() == restarted.keys()
    assert all(torch.equal(straight[key], restarted[key]) for key in straight)
    for number in (1, 2, 3):
        expected = list(range(4 * number - 4, 4 * number))
        assert samples(shared, f"{name}-00000{number}") == samples(again, f"{name}-00000{number}") == expected


@pytest.mark.parametrize("resident", [True, False])
def test_with_lora_a_version_is_published_whole_and_as_an_adapter(shared: Shared, resident: bool) -> None:
    import torch
    from peft import PeftModel

    lora = dataclasses.replace(shared, settings=shared.settings.model_copy(update={"lora_rank": 2}))
    rounds(lora, 1, resident=resident)
    rounds(lora, 1, resident=resident)  # from the training checkpoint
    base = shared.store.load("policy-000000").path
    version = shared.store.load("policy-000002")
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < {
        f.path for f in version.manifest.files
    }
    config = json.loads((version.path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    adapted = PeftModel.from_pretrained(load_causal(base), str(version.path), subfolder="adapter").merge_and_unload()
    weights, before = adapted.state_dict(), load_file(base / "model.safetensors")
    merged = load_file(version.path / "model.safetensors")
    for name, whole in merged.items():
        torch.testing.assert_close(weights[name], whole, rtol=0.01, atol=0.002)
    assert [name for name, whole in merged.items() if not torch.equal(whole, before[name])]
    rounds(lora, 1, name="reward", resident=resident)
    assert not [file.path for file in shared.store.load("reward-000001").manifest.files if "adapter" in file.path]


def test_a_version_is_published_beside_the_next_round(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), publish.Publisher.publish

    def slow(*arguments: object) -> object:
        assert go.wait(30.0)
        return real(*arguments)  # type: ignore[arg-type]

    task = Task("policy", shared, resident=True)
    task.resume()
    monkeypatch.setattr(publish.Publisher, "publish", slow)
    task.ingest(1.0)
    loop.turn(task)
    assert not (shared.store.root / "policy-000001").exists()
    task.ingest(0.0)
    following = task.batch()
    measured = task.learn(following, lambda report: None)  # while the first is not published yet
    go.set()
    task.checkpoint(following, measured)
    task.publish()
    task.close()
    assert [m.version for m in shared.store.versions(POLICY)] == ["policy-000002", "policy-000001", "policy-000000"]
    assert shared.store.load("policy-000002").manifest.parent == "policy-000001"


def test_what_fails_in_the_background_ends_the_task(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise errors.NoSpace("the disk is full", remedy="Free some.")

    task = Task("policy", shared, resident=True)
    task.resume()
    task.ingest(1.0)
    monkeypatch.setattr(publish.Publisher, "publish", full)
    loop.turn(task)
    with pytest.raises(errors.NoSpace, match="the disk is full"):
        task.close()


def test_without_its_checkpoints_a_task_goes_on_from_the_newest_version(shared: Shared) -> None:
    rounds(shared, 2)
    (shared.settings.training_path / "policy").rename(shared.settings.home / "moved away")
    rounds(shared, 1)
    third = shared.store.load("policy-000003").manifest
    assert third.parent == "policy-000002"
    assert third.lineage.steps == 3
    assert samples(shared, "policy-000003") == [8, 9, 10, 11]
    assert announced(shared) == [f"policy-00000{n}" for n in (0, 1, 2, 2, 3)]


def test_only_the_newest_keep_their_weights_and_what_the_others_learnt_is_not_learnt_again(shared: Shared) -> None:
    shared = dataclasses.replace(shared, settings=shared.settings.model_copy(update={"keep_versions": 1}))
    rounds(shared, 2)
    store, names = shared.store, [f"policy-00000{number}" for number in range(4)]
    assert [store.is_thin(name) for name in names] == [False, True, False, False]
    (shared.settings.training_path / "policy").rename(shared.settings.home / "moved away")
    rounds(shared, 1)  # from the newest version, which is what it begins from at every restart now
    rounds(shared, 0)
    assert [samples(shared, name) for name in names[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [store.is_thin(name) for name in names] == [False, True, False, False], "the second is what it began from"


def test_a_version_of_other_samples_under_the_same_name_is_refused(shared: Shared) -> None:
    rounds(shared, 1)
    first = shared.settings.training_path
    first.rename(shared.settings.home / "kept")
    (shared.settings.store_path / "policy-000001").rename(shared.settings.home / "policy-000001")
    for number in range(4):
        send(shared, number, ComparisonState.COMPARISON_STATE_RETRACTED)
    rounds(shared, 1)
    assert samples(shared, "policy-000001") == [4, 5, 6, 7]
    first.rename(shared.settings.home / "other")
    (shared.settings.home / "kept").rename(first)
    with pytest.raises(errors.Conflict, match=r"policy-000001 is in the store already, with other samples"):
        rounds(shared, 1)


def test_another_of_dpos_family_learns_from_the_stream(shared: Shared) -> None:
    settings = shared.settings.model_copy(update={"policy_objective": "cdpo"})
    rounds(dataclasses.replace(shared, settings=settings), 1)
    lineage = shared.store.load("policy-000001").manifest.lineage
    assert (lineage.objective, lineage.settings["label_smoothing"]) == ("cdpo", "0.1")


def test_what_was_learnt_and_then_retracted_is_in_the_next_lineage(shared: Shared) -> None:
    rounds(shared, 1)
    send(shared, 2, ComparisonState.COMPARISON_STATE_RETRACTED)
    send(shared, 5, ComparisonState.COMPARISON_STATE_RETRACTED)
    rounds(shared, 1)
    lineage = shared.store.load("policy-000002").manifest.lineage
    assert [int(sample_id[-12:]) for sample_id in lineage.retracted_sample_ids] == [2]
    assert samples(shared, "policy-000002") == [4, 6, 7, 8]
    assert (lineage.offsets[0].start, lineage.offsets[0].end) == (12, 14)


def test_the_manifest_says_what_was_measured_and_how(shared: Shared) -> None:
    rounds(shared, 1)
    rounds(shared, 1, name="reward")
    policy, reward = (shared.store.load(f"{name}-000001").manifest for name in ("policy", "reward"))
    assert policy.base_model == reward.base_model != ""
    assert policy.lineage.settings["beta"] == "0.1"
    assert policy.lineage.settings["learning_rate"] == "0.001"
    assert policy.lineage.settings["micro_batch_tokens"] == str(runtime.pass_tokens(0))
    assert {"loss", "margin", "accuracy", "grad_norm"} <= set(policy.metrics) & set(reward.metrics)
    assert len(policy.probes) == 1
    assert len(policy.probes[0].logprobs) == len(policy.probes[0].token_ids)
    scorer = load_scorer(shared.store.root / "reward-000001").to(runtime.device())
    tokens = [*reward.probes[0].prompt_token_ids, *reward.probes[0].token_ids]
    assert reward.probes[0].score == pytest.approx(sequence_score(scorer, tokens), abs=1e-6)
    assert reward.probes[0].score != 0.0
    assert (policy.lineage.objective, reward.lineage.objective) == ("dpo", "reward")


def test_a_version_comes_with_its_delta(shared: Shared) -> None:
    slow = shared.settings.model_copy(update={"policy_learning_rate": 1e-5})
    rounds(dataclasses.replace(shared, settings=slow), 1)
    parent, child = (shared.store.load(f"policy-00000{number}") for number in (0, 1))
    (packed,) = (file for file in child.manifest.files if file.path.endswith(delta.SUFFIX))
    (weights,) = (file for file in child.manifest.files if file.path == "model.safetensors")
    assert packed.path == "model.safetensors.delta"
    made = shared.store.root.parent / "made"
    delta.apply(parent.path / weights.path, child.path / packed.path, made, sha256=weights.sha256)
    assert made.read_bytes() == (child.path / weights.path).read_bytes()


def test_no_delta_is_written_where_most_has_changed(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MOST_CHANGED", 0.0)
    rounds(shared, 1)
    version = shared.store.load("policy-000001")
    assert [file.path for file in version.manifest.files if file.path.endswith(delta.SUFFIX)] == []


def test_while_the_broker_is_away_it_says_so_and_tries_again(
    shared: Shared, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_FIRST_RETRY_SECONDS", 0.01)
    assert isinstance(shared.log, MemoryLog)
    publisher = publish.Publisher(shared.store, shared.signer, shared.producer, shared.stop, task="policy")
    version = shared.store.load("policy-000000")
    shared.log.stop()
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not announced yet" in record.getMessage():
                said.set()

    listener = Listener()
    logging.getLogger("trainer.publish").addHandler(listener)
    result: list[bool] = []
    announcing = threading.Thread(target=lambda: result.append(publisher.announce(version)))
    announcing.start()
    assert said.wait(10.0)
    shared.log.start()
    announcing.join(10.0)
    logging.getLogger("trainer.publish").removeHandler(listener)
    assert result == [True]
    # At least once: what the broker took before it went away may come a second time.
    assert set(announced(shared)) == {"policy-000000"}

    shared.log.stop()
    shared.stop.set()
    assert publisher.announce(version) is False


def test_an_announcement_names_the_manifest_and_is_to_be_served(shared: Shared) -> None:
    version = shared.store.load("policy-000000")
    event = publish.version_event(version)
    assert (event.version, event.role, event.sequence) == ("policy-000000", POLICY, 0)
    assert event.state == VersionState.VERSION_STATE_STABLE
    assert event.manifest_sha256 == version.manifest_sha256
    assert event.HasField("at")


def test_the_trace_of_a_click_leads_to_the_version_that_learnt_it(shared: Shared, spans: InMemorySpanExporter) -> None:
    with tracing.span("vote") as vote:
        headers = tracing.headers()
    for number in (100, 101, 102, 103):
        send(shared, number, headers=headers if number == 102 else ())
    rounds(shared, 4)
    found = {span.name: span for span in spans.get_finished_spans()}  # the last of each name: of the fourth round
    click = vote.get_span_context()
    ingest, learnt, turn, publishing = (found[f"trainer.{name}"] for name in ("ingest", "learnt", "round", "publish"))
    for span in (ingest, learnt):
        assert span.parent is not None
        assert span.parent.span_id == click.span_id
    assert learnt.attributes == {"task": "policy", "version": "policy-000004"}
    assert [link.context.span_id for link in learnt.links] == [publishing.context.span_id]
    assert [link.context.span_id for link in turn.links] == [click.span_id]
    assert found["trainer.learn"].parent == publishing.parent == turn.context
    assert [len(span.links) for span in spans.get_finished_spans() if span.name == "trainer.round"] == [0, 0, 0, 1]
    [*_, last] = shared.log.consumer([topics.VERSIONS], group="test").poll(0.0)
    carried = tracing.of_record(last.headers)
    assert carried.split("-")[2] == format(publishing.context.span_id, "016x")


def test_an_announcement_tells_when_its_clicks_came_and_not_of_all(shared: Shared) -> None:
    rounds(shared, 1)
    records = shared.log.consumer([topics.VERSIONS], group="test").poll(0.0)
    told = [len(VersionEvent.FromString(record.value).learnt_received_at) for record in records]
    assert told == [0, 4]
    publisher = publish.Publisher(shared.store, shared.signer, shared.producer, shared.stop, task="policy")
    publisher.announce(shared.store.load("policy-000001"), [0.0, *(1000.5 + second for second in range(1000))])
    [*_, last] = shared.log.consumer([topics.VERSIONS], group="test").poll(0.0)
    times = [at.ToMicroseconds() / 1e6 for at in VersionEvent.FromString(last.value).learnt_received_at]
    assert times == [1000.5 + second for second in range(0, 1000, 4)]
