"""Two ranks learn what one learns, at every ZeRO stage, and go on bit for bit; the number of ranks may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_tiny_llama

pytestmark = pytest.mark.timeout(240)

SCRIPT = Path(__file__).with_name("ranks_script.py")
STAGES = (0, 1, 2, 3)


def run(ranks: int, model: Path, folder: Path, stages: str, checkpoint: Path | None = None) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(SCRIPT), str(model), str(folder), stages, *([str(checkpoint)] if checkpoint else [])]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=220, check=False, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(2, model, tmp_path_factory.mktemp("two"), "0,1,2,3")


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(1, model, tmp_path_factory.mktemp("one"), "0,2")


def weights(folder: Path, stage: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"stage-{stage}" / name / "model.safetensors")


def reports(folder: Path, stage: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((folder / f"stage-{stage}" / "reports.json").read_text())
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Length of the difference of all weights."""
    assert one.keys() == other.keys()
    return float(sum((one[n].double() - other[n].double()).square().sum() for n in one) ** 0.5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_bit_for_bit(two: Path, stage: int) -> None:
    straight, resumed = (weights(two, stage, name) for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(one: Path, two: Path, model: Path, stage: int) -> None:
    """The first step agrees to 0.5 %. Later ones do to 3 %: ranks have other micro-batches, forward passes are in bf16,
    and Adam takes a step of full size also where a gradient is little more than rounding, so weights differ by then; at
    the end by less than 15 % of the way that they have gone.
    """
    alone, together = reports(one, 0), reports(two, stage)
    assert len(alone) == len(together) == 7  # three steps, and twice the two of the second round
    for number, (a, b) in enumerate(zip(alone, together, strict=True)):
        near = 0.03 if number else 0.005
        assert b["loss"] == pytest.approx(a["loss"], rel=near, abs=0.01)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=near)
        assert b["margin"] == pytest.approx(a["margin"], rel=near, abs=0.2 if number else 0.01)
    before, expected, found = load_file(model / "model.safetensors"), weights(one, 0, "straight"), None
    found = weights(two, stage, "straight")
    assert distance(expected, found) < 0.15 * distance(before, expected)


@pytest.mark.parametrize(("saved", "stage"), [(3, "2"), (1, "0"), (0, "3")])
def test_one_rank_goes_on_where_two_stopped(two: Path, model: Path, tmp_path: Path, saved: int, stage: str) -> None:
    """And at another stage."""
    run(1, model, tmp_path, stage, two / f"stage-{saved}" / "checkpoint")
    expected, found = weights(two, saved, "straight"), weights(tmp_path, int(stage), "resumed")
    assert distance(expected, found) < 0.05 * distance(load_file(model / "model.safetensors"), expected)


def test_two_ranks_go_on_where_one_stopped(one: Path, model: Path, tmp_path: Path) -> None:
    run(2, model, tmp_path, "1,2,3", one / "stage-2" / "checkpoint")
    expected = weights(one, 2, "straight")
    for stage in (1, 2, 3):
        found = weights(tmp_path, stage, "resumed")
        assert distance(expected, found) < 0.05 * distance(load_file(model / "model.safetensors"), expected)
