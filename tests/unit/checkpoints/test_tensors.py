"""What is read from safetensors files without the library, and weights that are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thumbwheel import errors
from thumbwheel.checkpoints import tensors

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]


def test_the_table_is_what_was_saved(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.int64)}, tmp_path / "two.safetensors")
    assert tensors.table(tmp_path) == {"a": ("BF16", (3, 5)), "b": ("F32", (2,)), "c": ("I64", ())}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_weight_that_is_no_number_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = torch.linspace(-4, 4, 1000).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.ones(3), "second": weights}, path)
    tensors.require_finite(path)
    broken = weights.float()
    broken[617] = torch.nan
    save_file({"first": torch.ones(3), "second": broken.to(dtype)}, path)
    with pytest.raises(errors.CorruptCheckpoint, match="1 weights of second are infinite or not numbers"):
        tensors.require_finite(path)


@pytest.mark.parametrize("dtype", FLOATS[:5], ids=str)
def test_infinities_are_found(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = torch.ones(10)
    weights[[2, 7]] = torch.tensor([torch.inf, -torch.inf])
    save_file({"w": weights.to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(errors.CorruptCheckpoint, match="2 weights of w"):
        tensors.require_finite(tmp_path / "model.safetensors")


def test_the_largest_numbers_are_finite(tmp_path: Path) -> None:
    largest = {
        str(dtype): torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype) for dtype in FLOATS
    }
    save_file(largest | {"ids": torch.full((9,), -1)}, tmp_path / "model.safetensors")
    tensors.require_finite(tmp_path / "model.safetensors")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:6],
        whole[:40],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 64,
        whole.replace(b"shape", b"sharp"),
    ):
        path.write_bytes(content)
        with pytest.raises(errors.CorruptCheckpoint, match=r"model\.safetensors"):
            tensors.read_header(path)
