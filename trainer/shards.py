"""Optimizer and weights in a training checkpoint: a file a rank, for any number of ranks at any ZeRO stage to read.

    learner.json                  shapes, AdamW's count of steps, the objectives' states, how many files there are
    rank-00000.safetensors        KIND:PARAMETER, a flat part of it in float32, and where the part begins
    rank-00000.safetensors.sha256 its SHA-256, for who describes the folder

Files are written straight from the memory that the optimizer works on, without a copy, and hashed beside that.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from thumbwheel import errors, files
from trainer.engine import MASTER, Fragment

INDEX = "learner.json"
_FORMAT = 1
_POLL_SECONDS = 0.05
_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.int64: "I64"}


def file_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


def write(path: Path, fragments: Sequence[Fragment], more: Mapping[str, Tensor], captured: Callable[[], None]) -> None:
    """Writes fragments and some more tensors; the file has its name when it is whole and synced.

    `captured` is called as soon as the tensors may change again.
    """
    tensors = dict(more)
    starts = {}
    for fragment in fragments:
        starts[fragment.name] = str(fragment.start)
        tensors |= {f"{kind}:{fragment.name}": tensor for kind, tensor in fragment.tensors.items()}
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb", buffering=0) as file, files.Digest() as digest:
            for data in _serialized(tensors, starts):
                digest.update(data)
                view = memoryview(data)
                while len(view):
                    view = view[file.write(view) :]
            digest.wait()
            captured()
            os.fsync(file.fileno())
        path.with_name(path.name + files.DIGEST_SUFFIX).write_text(digest.hexdigest())
        part.rename(path)
    finally:
        captured()
        part.unlink(missing_ok=True)


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_index(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes what the files have in common."""
    (folder / INDEX).write_text(json.dumps({"format": _FORMAT, **fields}, indent=1))


def read_index(folder: Path) -> dict[str, Any]:
    """Reads `write_index`. Raises `errors.CorruptCheckpoint`."""
    try:
        found: dict[str, Any] = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise _of_another_release(folder, f"{INDEX} cannot be read: {error}") from error
    if found.get("format") != _FORMAT:
        raise _of_another_release(folder, f"{INDEX} has format {found.get('format')}")
    return found


def await_all(folder: Path, count: int, timeout: float) -> None:
    """Waits until all ranks have written their files. Raises `errors.DeadlineExceeded`."""
    deadline = time.monotonic() + timeout
    for rank in range(count):
        while not (folder / file_name(rank)).exists():
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(
                    f"Rank {rank} has not written {folder / file_name(rank)} within {timeout:g} s.",
                    remedy="All ranks need the same --home, on a disk that they share.",
                )
            time.sleep(_POLL_SECONDS)


class Shards:
    """What a folder holds of all ranks. Raises `errors.CorruptCheckpoint`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = read_index(folder)
        self.shapes = {name: tuple(shape) for name, shape in self.index["shapes"].items()}
        """Of the parameters that learn."""
        self._parts: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.shapes}
        self._files = []
        for rank in range(self.index["files"]):
            path = folder / file_name(rank)
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # the library raises what it likes
                raise _of_another_release(folder, f"{path.name} cannot be read: {error}") from error
            self._files.append(file)
            for name, start in (file.metadata() or {}).items():  # type: ignore[no-untyped-call]
                self._parts.setdefault(name, []).append((int(start), file))

    def fill(self, fragment: Fragment) -> None:
        """Reads a fragment's tensors. Raises `errors.CorruptCheckpoint` where a part of it is in none of the files."""
        for kind, tensor in fragment.tensors.items():
            filled = 0
            for start, file in self._parts.get(fragment.name, ()):
                source = file.get_slice(f"{kind}:{fragment.name}")
                (size,) = source.get_shape()
                first, last = max(start, fragment.start), min(start + size, fragment.start + fragment.size)
                if first < last:
                    part = source[first - start : last - start]
                    tensor.narrow(0, first - fragment.start, last - first).copy_(part)
                    filled += last - first
            if filled != fragment.size:
                raise errors.CorruptCheckpoint(
                    f"{self._folder} holds {filled:,} of {fragment.size:,} numbers of {kind} of {fragment.name}.",
                    remedy="Was it written with another base model?",
                )

    def weights(self, name: str) -> Tensor:
        """A parameter in bf16, bit for bit as the model had it. Only its own master weights are in memory meanwhile."""
        shape = self.shapes[name]
        whole = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        self.fill(Fragment(name, 0, {MASTER: whole}))
        return whole.view(shape).to(torch.bfloat16)

    def more(self, name: str, rank: int) -> Tensor:
        """A tensor that was written besides, by this rank; where there were fewer, by one of them."""
        found: Tensor = self._files[rank % len(self._files)].get_tensor(name)  # type: ignore[no-untyped-call]
        return found


def _of_another_release(folder: Path, fault: str) -> errors.CorruptCheckpoint:
    return errors.CorruptCheckpoint(f"{folder}: {fault}.", remedy="Was it written by another release?")
