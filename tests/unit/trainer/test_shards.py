"""What is written of parameters is read again, in whatever parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thumbwheel import errors, files
from trainer import shards
from trainer.engine import MASTER, MOMENTS, Fragment

KINDS = (MASTER, *MOMENTS)


def fragment(name: str, whole: dict[str, torch.Tensor], start: int, end: int) -> Fragment:
    return Fragment(name, start, {kind: whole[kind].view(-1)[start:end] for kind in KINDS})


def empty(name: str, start: int, end: int) -> Fragment:
    return Fragment(name, start, {kind: torch.zeros(end - start) for kind in KINDS})


@pytest.fixture
def matrix() -> dict[str, torch.Tensor]:
    return {kind: torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed, kind in enumerate(KINDS)}


@pytest.fixture
def folder(matrix: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """Three ranks: one has a part of the matrix, one the rest of it and a bias, one nothing."""
    bias = {kind: torch.arange(3.0) for kind in KINDS}
    captured: list[int] = []
    for rank, parts in enumerate(
        ([fragment("w", matrix, 0, 10)], [fragment("w", matrix, 10, 24), fragment("b", bias, 0, 3)], [])
    ):
        more = {"random": torch.tensor([rank, 7], dtype=torch.uint8)}
        shards.write(tmp_path / shards.file_name(rank), parts, more, lambda rank=rank: captured.append(rank))  # type: ignore[misc]
    shards.write_index(tmp_path, {"files": 3, "shapes": {"w": [4, 6], "b": [3]}, "optimizer_steps": 5})
    assert set(captured) == {0, 1, 2}
    return tmp_path


def test_the_files_are_what_the_formats_own_library_reads(folder: Path, matrix: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / shards.file_name(0))
    assert found.keys() == {"random", *(f"{kind}:w" for kind in KINDS)}
    assert torch.equal(found["exp_avg:w"], matrix["exp_avg"].view(-1)[:10])


def test_each_comes_with_its_digest(folder: Path) -> None:
    for rank in range(3):
        path = folder / shards.file_name(rank)
        assert path.with_name(f"{path.name}.sha256").read_text() == files.sha256(path)


@pytest.mark.parametrize(("start", "end"), [(0, 24), (0, 7), (8, 12), (10, 24), (23, 24)])
def test_any_part_is_put_together_of_those_that_there_are(
    start: int, end: int, folder: Path, matrix: dict[str, torch.Tensor]
) -> None:
    wanted = empty("w", start, end)
    shards.Shards(folder).fill(wanted)
    for kind in KINDS:
        assert torch.equal(wanted.tensors[kind], matrix[kind].view(-1)[start:end])


def test_weights_are_the_master_weights_in_bf16(folder: Path, matrix: dict[str, torch.Tensor]) -> None:
    assert torch.equal(shards.Shards(folder).weights("w"), matrix[MASTER].to(torch.bfloat16))


def test_more_ranks_than_files_take_turns(folder: Path) -> None:
    found = shards.Shards(folder)
    assert [found.more("random", rank).tolist() for rank in (0, 2, 3)] == [[0, 7], [2, 7], [0, 7]]


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(errors.CorruptCheckpoint, match=r"holds 24 of 30 numbers of master of w. Was it written with"):
        shards.Shards(folder).fill(empty("w", 0, 30))
    (folder / shards.file_name(1)).unlink()
    with pytest.raises(errors.CorruptCheckpoint, match=r"rank-00001.safetensors cannot be read"):
        shards.Shards(folder)
    with pytest.raises(errors.DeadlineExceeded, match=r"Rank 1 has not written .*same --home"):
        shards.await_all(folder, 3, timeout=0.0)


def test_a_file_that_fails_has_no_name_and_says_that_its_tensors_are_free(tmp_path: Path) -> None:
    captured: list[int] = []
    bad = {"bad": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(KeyError):
        shards.write(tmp_path / shards.file_name(0), [], bad, lambda: captured.append(1))
    assert captured
    assert list(tmp_path.iterdir()) == []
