"""Ranks but the first do what rank 0 says, until it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.unit.trainer.samples import make_samples
from trainer import ranks, runtime, team
from trainer.config import TrainerSettings
from trainer.guards import Unfit
from trainer.inference import Reference
from trainer.team import Team


class FakeLearner:
    """Notes what it is asked to do."""

    asked: list[tuple[Any, ...]]

    def __init__(self, objective: Any, start: Path, settings: Any, *, learning_rate: float, steps_done: int) -> None:
        FakeLearner.asked = [("made", objective.name, start, learning_rate, steps_done)]

    def restore(self, folder: Path) -> None:
        self.asked.append(("restore", folder))

    def learn(self, samples: Any, reference: Any, *, round_number: int, stop: Any, on_step: Any) -> dict[str, float]:
        self.asked.append(("learn", samples, sorted(reference), round_number))
        if round_number == 2:
            raise Unfit("The loss is nan.", reason="not_finite", remedy="Stop.")
        return {"loss": 1.0}

    def save(self, folder: Path, model: Path, *, grace: float) -> None:
        self.asked.append(("save", folder, model, grace))

    def close(self) -> None:
        self.asked.append(("close",))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 0 of two has said, as the others hear it."""
    heard: list[Any] = []
    monkeypatch.setattr(team, "Learner", FakeLearner)
    monkeypatch.setattr(Reference, "logprobs", lambda _, path, wanted, **__: {sample.id: 0 for sample in wanted})
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "lead", lambda: True)
    monkeypatch.setattr(ranks, "from_lead", lambda message: heard.append(json.loads(json.dumps(message))))
    return heard


def test_all_ranks_are_asked_the_same(said: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings, samples = TrainerSettings(), make_samples(3)
    lead = Team(settings, lambda: False)
    assert sorted(lead.reference(tmp_path, samples, {"known": [0.25]})) == [*(sample.id for sample in samples), "known"]
    lead.open("policy", tmp_path, steps_done=7, checkpoint=tmp_path / "checkpoint")
    assert lead.learn(samples, round_number=1) == {"loss": 1.0}
    lead.save(tmp_path / "a", tmp_path / "b", 2.5)
    with pytest.raises(Unfit):
        lead.learn(samples, round_number=2)
    lead.close()
    lead.end()
    by_lead = FakeLearner.asked
    assert [entry[0] for entry in by_lead] == ["made", "restore", "learn", "save", "learn", "close"]
    assert by_lead[2] == ("learn", samples, [*(sample.id for sample in samples), "known"], 1)

    told: Iterator[Any] = iter(said)
    monkeypatch.setattr(ranks, "lead", lambda: False)
    monkeypatch.setattr(ranks, "from_lead", lambda: next(told))
    Team(settings, lambda: False).follow()
    assert FakeLearner.asked == by_lead
    assert FakeLearner.asked is not by_lead
    assert list(told) == []


def test_the_others_hear_of_rank_0_also_where_there_is_nothing_to_do(
    said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lead = Team(TrainerSettings(), lambda: False)
    lead.idle()
    assert said == []
    monkeypatch.setattr(team, "IDLE_SECONDS", 0.0)
    lead.idle()
    assert [message["do"] for message in said] == ["idle"]


@pytest.mark.parametrize(
    ("count", "changes", "stays"),
    [
        (1, {"zero_stage": 3}, True),  # with one rank nothing is divided
        (2, {"zero_stage": 2}, True),
        (2, {"zero_stage": 3}, False),
        (1, {"cpu_offload": True}, False),
        (2, {"lora_rank": 8}, False),
    ],
)
def test_the_reference_stays_where_a_rank_holds_a_whole_model_anyway(
    count: int, changes: dict[str, object], stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Mock()
    monkeypatch.setattr(team, "Reference", made)
    monkeypatch.setattr(ranks, "count", lambda: count)
    Team(TrainerSettings.model_validate(changes), lambda: False)
    made.assert_called_once_with(keep=stays)


@pytest.mark.usefixtures("said")
def test_unless_told_the_reference_takes_what_suits_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Mock()
    made.return_value.logprobs.return_value = {}
    monkeypatch.setattr(team, "Reference", made)
    Team(TrainerSettings(), lambda: False).reference(tmp_path, make_samples(1))
    assert made.return_value.logprobs.call_args.kwargs["max_tokens"] == runtime.pass_tokens(0)
