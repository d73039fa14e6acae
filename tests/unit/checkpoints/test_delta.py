"""Deltas of any two weights files come back bit for bit, and what was tampered with is refused."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thumbwheel import errors, files
from thumbwheel.checkpoints import delta

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "BOOL": 1}
Contents = dict[str, tuple[str, bytes]]


def write_file(path: Path, contents: Contents) -> Path:
    """A safetensors file of one-dimensional tensors: name → (dtype, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, data) in contents.items():
        header[name] = {"dtype": dtype, "shape": [len(data) // WIDTHS[dtype]], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in contents.values()))
    return path


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Contents, Contents]:
    """A file and its successor: any bits, changed everywhere, here and there, or nowhere; tensors come and go."""
    before: Contents = {}
    after: Contents = {}
    for index in range(draw(st.integers(0, 4))):
        name, dtype = f"layer.{index}", draw(st.sampled_from(sorted(WIDTHS)))
        width = WIDTHS[dtype]
        size = width * draw(st.integers(0, 40))
        data = draw(st.binary(min_size=size, max_size=size))
        kind = draw(st.sampled_from(["same", "few", "all", "new", "gone", "longer", "other dtype"]))
        if kind != "new":
            before[name] = (dtype, data)
        if kind == "few" and data:
            changed = bytearray(data)
            for position in draw(st.lists(st.integers(0, len(data) - 1), max_size=3)):
                changed[position] ^= draw(st.integers(1, 255))
            after[name] = (dtype, bytes(changed))
        elif kind == "all":
            after[name] = (dtype, draw(st.binary(min_size=len(data), max_size=len(data))))
        elif kind == "longer":
            after[name] = (dtype, data + bytes(width))
        elif kind == "other dtype":
            after[name] = ("F8_E5M2", data)
        elif kind != "gone":
            after[name] = (dtype, data)
    return before, after


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_any_two_files_round_trip(pair: tuple[Contents, Contents]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        old, new = write_file(Path(folder, "old"), pair[0]), write_file(Path(folder, "new"), pair[1])
        delta.write(old, new, Path(folder, "delta"))
        delta.apply(old, Path(folder, "delta"), Path(folder, "made"), sha256=files.sha256(new))
        assert Path(folder, "made").read_bytes() == new.read_bytes()


def _two_versions(folder: Path) -> tuple[Path, Path, Path]:
    """Many bf16 weights, of which a fiftieth moves by a step or two; and their delta."""
    random = np.random.default_rng(0)
    before = (random.standard_normal(9_000_000, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    after = before.copy()
    moved = random.choice(len(before), len(before) // 50, replace=False)
    after[moved] += random.choice(np.array([1, 0xFFFF, 2], np.uint16), len(moved))
    old = write_file(folder / "old", {"w": ("BF16", before.tobytes()), "same": ("F32", bytes(400))})
    new = write_file(folder / "new", {"w": ("BF16", after.tobytes()), "same": ("F32", bytes(400))})
    delta.write(old, new, folder / "delta")
    return old, new, folder / "delta"


def test_few_changes_make_a_small_delta(tmp_path: Path) -> None:
    old, new, made = _two_versions(tmp_path)
    assert delta.changed_share(old, new) == pytest.approx(0.02, rel=0.01)
    assert made.stat().st_size < 0.02 * new.stat().st_size
    delta.apply(old, made, tmp_path / "made", sha256=files.sha256(new))
    assert files.sha256(tmp_path / "made") == files.sha256(new)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_corrupt_delta_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = write_file(folder / "old", {"a": ("BF16", bytes(range(200))), "b": ("F32", bytes(64))})
        new = write_file(folder / "new", {"a": ("BF16", bytes(range(1, 201))), "c": ("F32", bytes(64))})
        delta.write(old, new, folder / "delta")
        whole = bytearray((folder / "delta").read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
        position = data.draw(st.integers(0, len(whole) - 1))
        if kind == "flip":
            whole[position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del whole[position:]
        else:
            whole += b"\0"
        (folder / "delta").write_bytes(whole)
        try:
            delta.apply(old, folder / "delta", folder / "made", sha256=files.sha256(new))
        except errors.CorruptCheckpoint:
            return
        # Some bits of zlib's own framing mean nothing; the result is what counts.
        assert (folder / "made").read_bytes() == new.read_bytes()


def test_a_delta_of_another_parent_or_result_is_refused(tmp_path: Path) -> None:
    old, new, made = _two_versions(tmp_path)
    with pytest.raises(errors.CorruptCheckpoint, match="another parent"):
        delta.apply(new, made, tmp_path / "made", sha256=files.sha256(new))
    with pytest.raises(errors.CorruptCheckpoint, match="another file than the manifest names"):
        delta.apply(old, made, tmp_path / "made", sha256=hashlib.sha256(b"").hexdigest())
    with pytest.raises(errors.CorruptCheckpoint, match="is no delta"):
        delta.apply(old, new, tmp_path / "made", sha256=files.sha256(new))


def test_a_delta_that_is_sound_but_comes_to_something_else_is_refused(tmp_path: Path) -> None:
    old, new, made = _two_versions(tmp_path)
    other = write_file(tmp_path / "other", {"w": ("BF16", bytes(18_000_000)), "same": ("F32", bytes(400))})
    delta.write(old, other, made)
    wrong = bytes.fromhex(files.sha256(other))
    made.write_bytes(made.read_bytes().replace(wrong, bytes.fromhex(files.sha256(new)), 1))
    with pytest.raises(errors.CorruptCheckpoint, match="does not come to the file that the manifest names"):
        delta.apply(old, made, tmp_path / "made", sha256=files.sha256(new))
