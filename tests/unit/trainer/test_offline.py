"""Learning from a file writes a model that Transformers loads, and says before what it will do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from thumbwheel import errors, files
from trainer import offline
from trainer.config import OfflineSettings
from trainer.runtime import Stopped

PAIRS = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": f" I will not say {n}"} for n in range(4)]
THUMBS = [{"prompt": f"Say {n}.", "completion": f" {n}", "label": n % 2 == 0} for n in range(4)]
EDITS = [{"prompt": f"Say {n}.", "completion": f" {n}!"} for n in range(2)]
GROUPS = [{"prompt": f"Say {n}.", "responses": [f" {n}", " no", " why"], "rewards": [1, 0, -1]} for n in range(3)]


def settings_for(folder: Path, rows: list[Any], objective: str, base_model: Path, **changes: object) -> OfflineSettings:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "data": data,
        "objective": objective,
        "base_model": str(base_model),
        "learning_rate": 1e-3,
        "batch_size": 2,
    }
    return OfflineSettings.model_validate(fields | changes)


def test_a_dry_run_says_what_would_be_learnt_from_what(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, PAIRS + THUMBS[:1] + EDITS, "dpo+0.1*sft", policy_path, dry_run=True, epochs=3)
    offline.run(settings, lambda: False)
    said = capsys.readouterr().out
    lines = [tuple(line.split(None, 1)) for line in said.splitlines()]
    # Characters are tokens here, and every response ends with one more.
    assert lines == [
        ("data", f"{settings.data}: 4 pairs, 2 demonstrations"),
        ("objective", "dpo, weight 1: learns from 4 pairs"),
        ("objective", "sft, weight 0.1: learns from 2 demonstrations"),
        ("not", "used    1 thumb: none of kto is in the objective"),
        ("base", f"model  {policy_path}"),
        ("prompts", "6 to 6, median 6 tokens"),
        ("responses", "3 to 18, median 4 tokens"),
        ("steps", "3 × 3, of at most 2 samples, at learning rate 0.001"),
        ("tokens", "92 learnt from and 128 computed in each pass, prompts of several responses once, without padding"),
        ("output", str(tmp_path / "data-dpo-0.1-sft")),
        ("Nothing", "was learnt: this was a dry run."),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("dpo+0.1*sft", PAIRS + EDITS),
        ("kto", THUMBS),
        ("grpo+0.1*sft", GROUPS + EDITS),
        ("ppo", GROUPS),
        ("reward", PAIRS),
    ],
)
def test_every_kind_of_file_makes_a_model(objective: str, rows: list[Any], tmp_path: Path, policy_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    settings = settings_for(tmp_path, rows, objective, policy_path)
    offline.run(settings, lambda: False)
    output = settings.output_path
    training = json.loads((output / "training.json").read_text())
    assert training["objective"] == objective
    assert training["data_sha256"] == files.sha256(settings.data)
    assert sum(training["counts"].values()) == len(rows)
    assert training["metrics"]["grad_norm"] > 0
    auto = AutoModelForSequenceClassification if objective == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(output)
    assert loaded.config.architectures == [type(loaded).__name__]
    assert AutoTokenizer.from_pretrained(output).chat_template
    weights, before = load_file(output / "model.safetensors"), load_file(policy_path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert any(not torch.equal(weights[name], before[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data.jsonl", output.name])
    with pytest.raises(errors.Conflict, match=r"is there already. Name another folder by --output"):
        offline.run(settings, lambda: False)


@pytest.mark.usefixtures("one_rank")
def test_lora_writes_the_whole_model_or_the_adapter_alone(tmp_path: Path, policy_path: Path) -> None:
    settings = settings_for(tmp_path, PAIRS, "dpo", policy_path).model_copy(update={"lora_rank": 2})
    offline.run(settings, lambda: False)
    whole = load_file(settings.output_path / "model.safetensors")
    assert whole.keys() == load_file(policy_path / "model.safetensors").keys()
    alone = settings.model_copy(update={"adapter": True, "output": tmp_path / "alone"})
    offline.run(alone, lambda: False)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in alone.output_path.iterdir()}
    assert not (alone.output_path / "model.safetensors").exists()
    with pytest.raises(errors.InvalidArgument, match=r"adapter: is set, but there is none to write. Set --lora-rank"):
        offline.run(alone.model_copy(update={"lora_rank": 0}), lambda: False)


@pytest.mark.usefixtures("one_rank")
def test_being_stopped_leaves_nothing(tmp_path: Path, policy_path: Path) -> None:
    settings = settings_for(tmp_path, PAIRS, "dpo", policy_path)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) >= len(PAIRS) + 2)  # once a line, for the reference, and then within the round
        return asked[-1]

    with pytest.raises(Stopped):
        offline.run(settings, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_an_objective_that_learns_from_none_of_the_lines_is_an_error(tmp_path: Path, policy_path: Path) -> None:
    settings = settings_for(tmp_path, PAIRS + EDITS[:1], "grpo", policy_path)
    message = r"objective: is 'grpo', which learns from none .*: they are 4 pairs and 1 demonstration. Use one of dpo,"
    with pytest.raises(errors.InvalidArgument, match=message):
        offline.run(settings, lambda: False)
    with pytest.raises(errors.InvalidArgument, match=r"objective: is 'dop', in which 'dop' is no objective"):
        offline.run(settings.model_copy(update={"objective": "dop"}), lambda: False)


def test_a_bad_line_ends_the_command_with_one_line(tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "p", "chosen": "a"}\n')
    command = [sys.executable, "-m", "trainer", "--data", str(data), "--objective", "dpo"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "python -m trainer: bad.jsonl:1: rejected: is missing. "
        "See `python -m trainer --data FILE --help` for the forms there are."
    ]
    assert ended.stdout == ""
