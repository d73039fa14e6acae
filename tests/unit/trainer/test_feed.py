"""What a round is made of beside people's judgements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.unit.trainer.samples import make_demonstrations, make_groups, make_samples
from thumbwheel import errors
from trainer import feed, metrics
from trainer.buffer import Buffer
from trainer.config import TrainerSettings
from trainer.feed import Feed
from trainer.ingest import Encoder
from trainer.prompts import Prompts
from trainer.replay import Replay
from trainer.samples import Demonstration, Group, Kind, Pair, Rollout, Sample


def make_feed(*kinds: Kind, demonstrations: int = 0, **settings: object) -> Feed:
    return Feed(
        TrainerSettings.model_validate(settings),
        "policy",
        kinds,
        prompts=Prompts(1),
        replay=Replay(seed=0),
        demonstrations=make_demonstrations(demonstrations),
    )


@pytest.mark.parametrize(
    ("kinds", "pairs_from", "taken", "online"),
    [
        ({Pair}, "people", {Pair}, False),
        ({Pair}, "both", {Pair}, True),
        ({Pair, Demonstration}, "reward_model", {Demonstration}, True),
        ({Group}, "people", set(), True),
    ],
)
def test_what_is_taken_from_the_stream_follows_from_the_objective(
    kinds: set[Kind], pairs_from: str, taken: set[Kind], online: bool
) -> None:
    settings = TrainerSettings.model_validate({"pairs_from": pairs_from})
    assert feed.wanted_kinds(kinds, settings) == taken
    assert feed.wants_rollouts(kinds, settings) is online


def test_the_reward_model_prefers_the_best_of_a_group_to_the_worst() -> None:
    rollouts = tuple(Rollout((10 + n,), reward) for n, reward in enumerate((0.5, 2.0, -1.0)))
    group = Group(id="p/1", prompt=(1,), rollouts=rollouts, versions=("policy-000003",), weight=2.0)
    pair = feed.pair_of(group)
    assert pair == Pair(
        id="p/1/pair", prompt=(1,), chosen=(11,), rejected=(12,), versions=("policy-000003",), weight=2.0
    )
    same = tuple(Rollout((10 + n,), 1.0) for n in range(3))
    assert feed.pair_of(dataclasses.replace(group, rollouts=same)) is None


def test_a_lesson_of_dpo_has_pairs_of_people_and_of_the_reward_model() -> None:
    pairs, groups = make_samples(2), make_groups(3)
    lesson = make_feed(Pair, pairs_from="both").lesson([*pairs, *groups], round_number=1)
    assert lesson == [*pairs, *(feed.pair_of(group) for group in groups)]
    both = make_feed(Pair, Group, pairs_from="both").lesson(groups, round_number=1)
    assert len({sample.id for sample in both}) == len(both) == 6
    assert make_feed(Group).lesson(groups, round_number=1) == groups


def test_what_was_learnt_and_demonstrations_are_mixed_in_by_their_ratios() -> None:
    made = make_feed(Pair, Demonstration, demonstrations=20, replay_ratio=0.5, demonstrations_ratio=0.25)
    old, new = make_samples(30), make_samples(12)
    made.replay.learnt(old)
    lesson = made.lesson(new, round_number=3)
    assert lesson[:12] == new
    kinds = [sample for sample in lesson[12:] if isinstance(sample, Pair)]
    shown = [sample for sample in lesson[12:] if isinstance(sample, Demonstration)]
    assert (len(kinds), len(shown)) == (6, 3)
    assert {sample.id for sample in kinds} <= {sample.id for sample in old}
    assert made.lesson(new, round_number=3) == lesson
    assert made.lesson(new, round_number=4) != lesson


def test_rollouts_that_are_too_old_are_dropped_and_counted() -> None:
    made, buffer = make_feed(Group, max_staleness=2), Buffer()
    groups = [
        dataclasses.replace(group, versions=(f"policy-00000{number}", "policy-000005"))
        for number, group in enumerate(make_groups(6))
    ]
    pairs: list[Sample] = [*make_samples(1)]
    for sample in [*groups, *pairs]:
        buffer.add(sample, 0.0)
    counted = metrics.ROLLOUTS.labels("policy", "stale")._value.get()
    made.drop_stale(buffer, newest=5)
    assert [sample.id for sample in buffer.oldest(9)] == [groups[n].id for n in (3, 4, 5)] + [pairs[0].id]
    assert metrics.ROLLOUTS.labels("policy", "stale")._value.get() == counted + 3


def test_demonstrations_are_read_from_a_file_and_nothing_else_is_taken(policy_path: Path, tmp_path: Path) -> None:
    encoder = Encoder(policy_path, max_length=64, scores_text=False)
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "bc"}) + "\n")
    (found,) = feed.read_demonstrations(path, encoder.tokenizer, encoder.vocab_size, 64)
    assert found.response == (*encoder.tokenizer("bc")["input_ids"], 2)
    path.write_text(json.dumps({"prompt": "a", "completion": "bc", "label": True}) + "\n")
    with pytest.raises(errors.InvalidArgument, match=r"demonstrations: .*sft.jsonl.* is no demonstration"):
        feed.read_demonstrations(path, encoder.tokenizer, encoder.vocab_size, 64)


def test_the_newest_reward_version_is_told() -> None:
    groups = [dataclasses.replace(group, reward_version=f"reward-00000{n}") for n, group in enumerate(make_groups(3))]
    assert feed.reward_version([*groups, *make_samples(2)]) == "reward-000002"
    assert feed.reward_version(make_samples(2)) == ""
