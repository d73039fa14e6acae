"""Safetensors files as they lie on the disk: what their headers say, and whether every weight is a finite number.

8 bytes, little-endian: length of the header │ header: JSON, name → dtype, shape, data_offsets │ data
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thumbwheel import errors

_Array = np.ndarray[Any, Any]

MAX_HEADER = 100_000_000
"""Longest header in bytes, as the format's own library has it."""

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of an element. All others are taken byte by byte, and some of them are smaller than a byte."""

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 22

# Bits of the exponent: where all are set, the value is an infinity or not a number.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E5M2": (np.uint8, 0x7C),
}
# These have no infinities: all bits but the sign set is the one value that is not a number.
_NOT_A_NUMBER = {"F8_E4M3": 0x7F}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[bytes, list[Tensor]]:
    """The bytes before the data, and the tensors in the order in which they lie.

    Raises `errors.CorruptCheckpoint` where the file is not of the format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        if length > min(MAX_HEADER, size - len(prefix)):
            raise _malformed(path, "ends within its header")
        prefix += file.read(length)
    return prefix, parse_header(prefix, path, size)


def parse_header(prefix: bytes, path: Path, size: int) -> list[Tensor]:
    """The tensors that `prefix`, the bytes before the data of a file of `size` bytes, tells of; in their order."""
    try:
        header: dict[str, Any] = json.loads(prefix[_LENGTH.size :])
        header.pop("__metadata__", None)
        tensors = [
            Tensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *_span(entry, len(prefix)))
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(path, f"has no header that can be read ({error!r})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    at = len(prefix)
    for tensor in tensors:
        if tensor.start != at or tensor.end < tensor.start:
            raise _malformed(path, f"has a gap before {tensor.name}")
        width, size_of = WIDTHS.get(tensor.dtype), tensor.end - tensor.start
        if min(tensor.shape, default=0) < 0 or (width is not None and size_of != width * math.prod(tensor.shape)):
            raise _malformed(path, f"has {size_of:,} bytes for {tensor.name}, which its shape does not come to")
        at = tensor.end
    if at != size:
        raise _malformed(path, f"has {size:,} bytes where its header tells of {at:,}")
    return tensors


def table(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor in the folder's safetensors files, read from their headers alone."""
    return {
        tensor.name: (tensor.dtype, tensor.shape)
        for path in sorted(folder.glob("*.safetensors"))
        for tensor in read_header(path)[1]
    }


def require_finite(path: Path) -> None:
    """Raises `errors.CorruptCheckpoint` naming the first tensor with a weight that is infinite or not a number.

    Reads the whole file, in chunks, outside the interpreter's lock.
    """
    _, tensors = read_header(path)
    if not tensors:
        return
    data = np.memmap(path, np.uint8, "r")
    for tensor in tensors:
        bad = _count_bad(data[tensor.start : tensor.end], tensor.dtype)
        if bad:
            raise errors.CorruptCheckpoint(
                f"{path.parent.name}/{path.name}: {bad:,} weights of {tensor.name} are infinite or not numbers.",
                remedy="The training that made this version diverged: lower its learning rate.",
            )


def _count_bad(data: _Array, dtype: str) -> int:
    if dtype in _EXPONENTS:
        kind, mask = _EXPONENTS[dtype]
        bits = data.view(kind)
        exponent = kind(mask)
        return sum(
            int(np.count_nonzero((bits[at : at + _CHUNK] & exponent) == exponent)) for at in range(0, len(bits), _CHUNK)
        )
    if dtype in _NOT_A_NUMBER:
        return int(np.count_nonzero((data & 0x7F) == _NOT_A_NUMBER[dtype]))
    return 0  # integers and booleans are always numbers


def _span(entry: dict[str, Any], offset: int) -> tuple[int, int]:
    start, end = entry["data_offsets"]
    return int(start) + offset, int(end) + offset


def _malformed(path: Path, fault: str) -> errors.CorruptCheckpoint:
    return errors.CorruptCheckpoint(
        f"{path.parent.name}/{path.name} {fault}.", remedy="It is no safetensors file: publish the version again."
    )
