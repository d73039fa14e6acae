"""A task that is fed by rollouts, thumbs and demonstrations: rounds, restarts, guards, and what its manifests say."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import Deployment
from tests.unit.trainer.fleet import EOS, Fleet
from tests.unit.trainer.test_ingest import comparison
from thumbwheel.auth import ManifestSigner
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonState, GenerationEvent, ThumbEvent
from thumbwheel.v1.preference_pb2 import ThumbValue
from thumbwheel.v1.rollout_pb2 import CheckpointManifest
from trainer import loop, metrics, publish, rollouts
from trainer.config import TrainerSettings
from trainer.inference import Reference
from trainer.samples import Sample
from trainer.shared import Shared
from trainer.task import Task
from trainer.voting import Voting

pytestmark = pytest.mark.usefixtures("one_rank")

Make = Callable[..., Shared]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(rollouts, "FIRST_PAUSE", 0.05)
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def make(policy_path: Path, tmp_path: Path, fleet: Fleet) -> Iterator[Make]:
    """A deployment whose policy learns by the objective that is named, four samples a round."""
    deployment = Deployment(tmp_path)
    signer = ManifestSigner.load(tmp_path / "keys")
    publish.ensure_base(policy_path, deployment.store, signer)
    log = MemoryLog(delivery_timeout=0.1)
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)

    def made(objective: str, **settings: object) -> Shared:
        given = {"home": tmp_path, "round_size": 4, "batch_size": 4, "policy_learning_rate": 1e-5, "max_length": 64}
        given |= {"policy": fleet.address("policy"), "reward": fleet.address("reward"), "rollout_tokens": 12}
        parsed = TrainerSettings.model_validate(given | {"policy_objective": objective} | settings)
        return Shared(parsed, log, log.producer(), deployment.store, signer, threading.Event())

    yield made
    log.close()


def send(shared: Shared, *numbers: int, demonstration: bool = False) -> None:
    for number in numbers:
        event = comparison(number)
        event.prompt_token_ids[0] += number
        event.demonstration = demonstration
        if demonstration:
            event.chosen.ClearField("token_ids")
            event.chosen.ClearField("spans")
        shared.producer.send(topics.COMPARISONS, b"key", event.SerializeToString()).result(1.0)


def until_due(task: Task, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not task.due():
        assert time.monotonic() < deadline, f"no round was due in {seconds} s"
        task.ingest(0.1)


def turns(shared: Shared, count: int) -> Task:
    task = Task("policy", shared, resident=True)
    task.resume()
    for _ in range(count):
        until_due(task)
        loop.turn(task)
    return task


def manifest(shared: Shared, number: int) -> CheckpointManifest:
    return shared.store.load(f"policy-{number:06d}").manifest


def ids(shared: Shared, number: int) -> list[str]:
    found = (shared.store.load(f"policy-{number:06d}").path / "samples.txt").read_text().split()
    return [f"{int(name.partition('/')[0][-12:])}/{name.partition('/')[2]}" for name in found]


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_prompts_of_people_become_rollouts_become_versions(objective: str, make: Make, fleet: Fleet) -> None:
    shared = make(objective)
    send(shared, *range(8))
    task = turns(shared, 1)
    fleet.version = "policy-000001"
    until_due(task)
    loop.turn(task)
    task.close()
    first, second = manifest(shared, 1), manifest(shared, 2)
    assert sorted(ids(shared, 1) + ids(shared, 2)) == sorted(f"{number}/1" for number in range(8))
    assert (first.lineage.objective, first.lineage.sample_count) == (objective, 4)
    assert first.lineage.reward_version == "reward-000001"
    assert {"reward", "response_tokens", "kl", "entropy", "clip_fraction", "importance_weight"} <= set(first.metrics)
    # The second round's rollouts were asked for before the first was learnt: one batch ahead, one version behind.
    assert (first.metrics["staleness"], second.metrics["staleness"]) == (0.0, 1.0)
    assert sorted(fleet.asked) == sorted(f"{comparison(number).comparison_id}/1" for number in range(8))
    if objective == "ppo":  # the reference's response has a score of its own, which is taken off
        raw = -sum((5, 6, 7, 8)) / 4
        assert first.metrics["reward"] != pytest.approx(raw, abs=0.2)


def test_the_reward_model_labels_pairs_for_dpo(make: Make, fleet: Fleet) -> None:
    shared = make("dpo", pairs_from="both", round_size=6)
    send(shared, 0, 1, 2)
    turns(shared, 1).close()
    assert sorted(ids(shared, 1)) == sorted([f"{n}/" for n in range(3)] + [f"{n}/1" for n in range(3)])
    assert manifest(shared, 1).metrics["accuracy"] >= 0.0
    assert manifest(shared, 1).lineage.sample_count == 6


def test_a_crash_asks_again_for_what_was_not_back_and_learns_each_prompt_once(make: Make, fleet: Fleet) -> None:
    shared = make("grpo", round_size=3)
    send(shared, *range(9))
    turns(shared, 1).close()  # with rollouts of the next round on their way, which are lost with it
    turns(shared, 2).close()
    learnt = [name for number in (1, 2, 3) for name in ids(shared, number)]
    assert sorted(learnt) == sorted(f"{number}/1" for number in range(9))


def test_prompts_without_anything_to_learn_are_left_out(make: Make, fleet: Fleet) -> None:
    fleet.judge = lambda text: 1.0 if text.startswith(("11 ", "12 ")) else float(len(text))
    shared = make("grpo", round_size=2)
    flat = metrics.ROLLOUTS.labels("policy", "flat")._value.get()
    send(shared, 0, 1, 2, 3)
    turns(shared, 1).close()
    assert ids(shared, 1) == ["2/1", "3/1"]
    assert metrics.ROLLOUTS.labels("policy", "flat")._value.get() == flat + 2


def test_a_retraction_takes_prompt_and_rollouts_back(make: Make, fleet: Fleet) -> None:
    shared = make("grpo", round_size=3)
    send(shared, 0, 1)
    task = Task("policy", shared, resident=True)
    task.resume()
    deadline = time.monotonic() + 30
    while len(fleet.asked) < 2 or task.waiting < 2:
        assert time.monotonic() < deadline
        task.ingest(0.1)
    gone = comparison(0)
    gone.state = ComparisonState.COMPARISON_STATE_RETRACTED
    shared.producer.send(topics.COMPARISONS, b"key", gone.SerializeToString()).result(1.0)
    task.ingest(1.0)
    assert task.waiting == 1
    send(shared, 2, 3)
    until_due(task)
    loop.turn(task)
    task.close()
    assert ids(shared, 1) == ["1/1", "2/1", "3/1"]


def test_thumbs_feed_kto_and_edits_are_demonstrations(make: Make) -> None:
    shared = make("kto+0.5*sft", round_size=6)
    for number in range(4):
        event = ThumbEvent(
            thumb_id=f"01890000-0000-7000-8000-{number:012d}",
            state=ComparisonState.COMPARISON_STATE_ACCEPTED,
            prompt_token_ids=range(10 + number, 20),
            value=ThumbValue.THUMB_VALUE_UP if number % 2 else ThumbValue.THUMB_VALUE_DOWN,
            weight=1.0,
        )
        event.response.token_ids.extend([50 + number, 51, EOS])
        shared.producer.send(topics.THUMBS, b"key", event.SerializeToString()).result(1.0)
    shown = GenerationEvent(consent=True)
    shown.generation.token_ids.extend(range(3))
    for _ in range(9):
        shared.producer.send(topics.GENERATIONS, b"key", shown.SerializeToString()).result(1.0)
    send(shared, 10)  # a pair, of no use here
    send(shared, 11, 12, demonstration=True)
    turns(shared, 1).close()
    assert ids(shared, 1) == ["0/", "1/", "2/", "3/", "11/demonstration", "12/demonstration"]
    assert {"kto_loss", "kto_kl", "sft_nll"} <= set(manifest(shared, 1).metrics)
    task = Task("policy", shared, resident=True)
    assert task._feed.voting == Voting(shown=Counter({2: 9}), voted=Counter({2: 4})), "as the checkpoint has it"
    task.close()


def test_demonstrations_and_replayed_samples_come_beside_the_new(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    logprobs = Reference.logprobs

    def counted(reference: Reference, path: Path, wanted: Sequence[Sample], **given: Any) -> dict[str, Tensor]:
        asked.append(sorted(sample.id[-1] for sample in wanted))
        return logprobs(reference, path, wanted, **given)

    monkeypatch.setattr(Reference, "logprobs", counted)
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "completion": f"b{n}"}) + "\n" for n in range(5)))
    shared = make("dpo+0.1*sft", demonstrations=path, demonstrations_ratio=0.5, replay_ratio=0.5)
    send(shared, *range(8))
    turns(shared, 1).close()
    turns(shared, 1).close()  # from what the first has written down
    assert [manifest(shared, n).metrics["added_samples"] for n in (1, 2)] == [2.0, 4.0]
    assert "sft_nll" in manifest(shared, 1).metrics
    assert ids(shared, 2) == ["4/", "5/", "6/", "7/"], "only what is new counts as learnt"
    assert asked == [["0", "1", "2", "3"], ["4", "5", "6", "7"]], (
        "of what is learnt again, the reference is not asked again"
    )


def test_a_guard_stops_learning_says_why_and_loses_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    shared = make("grpo", max_kl=1e-12, batch_size=2)
    send(shared, *range(4))
    with caplog.at_level(logging.CRITICAL):
        task = turns(shared, 1)
    assert "this round is not published, and the last version stays as it is" in caplog.text
    assert "set --max-kl, and start the trainer again" in caplog.text
    assert metrics.HALTED.labels("policy", "kl")._value.get() == 1
    task.ingest(0.0)
    assert (task.due(), task.waiting) == (False, 4)
    task.close()
    assert [m.sequence for m in shared.store.versions(manifest(shared, 0).role)] == [0]
    turns(make("grpo", max_kl=0.0), 1).close()
    assert ids(shared, 1) == ["0/1", "1/1", "2/1", "3/1"]


def test_a_loss_that_is_no_number_halts_as_well(make: Make) -> None:
    shared = make("dpo", policy_learning_rate=1e30, batch_size=2, max_grad_norm=1e30)
    send(shared, *range(4))
    task = turns(shared, 1)
    assert metrics.HALTED.labels("policy", "not_finite")._value.get() == 1
    task.ingest(0.0)
    assert (task.due(), task.waiting) == (False, 4)
    task.close()


def test_guards_compare_with_the_first_round_also_after_a_restart(make: Make, fleet: Fleet) -> None:
    shared = make("grpo", round_size=3)
    send(shared, *range(6))
    turns(shared, 1).close()
    fleet.say = lambda prompt, index: [prompt[0]] * (9 + index)
    tight = dataclasses.replace(
        shared, settings=shared.settings.model_copy(update={"max_length_growth": 1.5, "max_repetition": 0.0})
    )
    task = turns(tight, 1)
    task.close()
    assert metrics.HALTED.labels("policy", "length")._value.get() == 1
