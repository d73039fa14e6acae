"""Deltas: how a weights file is made out of the same file of the version before, bit for bit.

At the learning rates of reinforcement learning an update moves few bf16 weights across a rounding boundary, and those
mostly by one step. So a delta keeps, of each tensor, which elements changed and by how much, as integers:

    "TWDELTA1" │ SHA-256 of the parent's file │ SHA-256 of the result │ size of the result (u64)
    blob: the result's safetensors header
    of each tensor, in the order in which its data lie:
        0                                        it is the parent's
        1, of each run of 4,194,304 elements:    u8 width of a gap: 1, 2 or 4 bytes; 0 where nothing changed
             u32 elements changed, blob          gaps between their indices, then their changes, in byte planes
        2, blob                                  whole: the parent has no such tensor

A change is the difference of the two bit patterns, read as unsigned integers of the element's width, in zigzag order
(0, −1, 1, −2 … become 0, 1, 2, 3 …): one step up or down is one small number, whatever the float type. A plane holds
the first bytes of all numbers, the next the second bytes: the upper planes are nearly all zero. A blob is a length
(u64) and as many bytes of zlib; Huffman codes and run lengths are all that such planes let one gain, and looking for
longer matches takes four times as long for a larger file. Numbers are little-endian.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from thumbwheel import errors, files
from thumbwheel.checkpoints import tensors
from thumbwheel.checkpoints.tensors import Tensor

_Array = np.ndarray[Any, Any]

SUFFIX = ".delta"
"""What is added to the name of a weights file for the name of its delta."""

MAGIC = b"TWDELTA1"

_RUN = 1 << 22
_THREADS = min(8, os.cpu_count() or 1)
"""What a delta is written with: runs are packed side by side."""
_SAME, _CHANGED, _WHOLE = 0, 1, 2
_U8, _U32, _U64 = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
_UNCHANGED = _U8.pack(0)
_KINDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def changed_share(parent: Path, target: Path) -> float:
    """Share of the elements of `target` whose bits are not those of `parent`: 0 to 1. What is new counts as changed."""
    have = {tensor.name: tensor for tensor in tensors.read_header(parent)[1]}
    old, new = _data(parent), _data(target)
    changed = total = 0
    for tensor in tensors.read_header(target)[1]:
        now = _elements(new, tensor)
        total += len(now)
        twin = have.get(tensor.name)
        if twin is None or (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
            changed += len(now)
        else:
            changed += int(np.count_nonzero(now != _elements(old, twin)))
    return changed / total if total else 0.0


def write(parent: Path, target: Path, delta: Path, *, sha256s: Callable[[], tuple[str, str]] | None = None) -> None:
    """Writes to `delta` how the safetensors file `target` is made out of the file `parent`.

    `sha256s` is asked last for what is known of both files already; they are hashed where it is left out.
    """
    prefix, wanted = tensors.read_header(target)
    have = {tensor.name: tensor for tensor in tensors.read_header(parent)[1]}
    old, new = _data(parent), _data(target)

    def twins() -> Iterator[tuple[Tensor, Tensor]]:
        for tensor in wanted:
            twin = have.get(tensor.name)
            if twin is not None and (twin.dtype, twin.shape) == (tensor.dtype, tensor.shape):
                yield tensor, twin

    def runs() -> Iterator[tuple[_Array, _Array]]:
        for tensor, twin in twins():
            before, after = _elements(old, twin), _elements(new, tensor)
            for start in range(0, len(after), _RUN):
                yield before[start : start + _RUN], after[start : start + _RUN]

    known = {tensor.name for tensor, _ in twins()}
    with delta.open("wb") as out, ThreadPoolExecutor(_THREADS, "delta") as pool:
        out.write(MAGIC + bytes(64) + _U64.pack(target.stat().st_size))
        out.write(_blob(prefix))
        packed = _ahead(pool, runs())
        for tensor in wanted:
            if tensor.name not in known:
                out.write(_U8.pack(_WHOLE) + _blob(new[tensor.start : tensor.end].tobytes()))
                continue
            its = list(itertools.islice(packed, -(-len(_elements(new, tensor)) // _RUN)))
            out.write(_U8.pack(_CHANGED) + b"".join(its) if any(run != _UNCHANGED for run in its) else _U8.pack(_SAME))
        hashes = sha256s() if sha256s else (files.sha256(parent), files.sha256(target))
        out.seek(len(MAGIC))
        out.write(bytes.fromhex("".join(hashes)))


def apply(parent: Path, delta: Path, target: Path, *, sha256: str, parent_sha256: str = "") -> None:
    """Writes to `target` the file that `delta` makes out of `parent`, whose SHA-256 is to be `sha256`. That of the
    parent is worked out where it is left out.

    Raises `errors.CorruptCheckpoint` where the delta belongs to another parent or result, or comes to something else;
    what was written is then of no use.
    """
    with delta.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise _corrupt(delta, "is no delta")
        if file.read(32).hex() != (parent_sha256 or files.sha256(parent)):
            raise _corrupt(delta, f"belongs to another parent than {parent.parent.name}")
        if file.read(32).hex() != sha256:
            raise _corrupt(delta, "makes another file than the manifest names")
        with target.open("wb") as out, files.Digest() as digest:
            for piece in _pieces(parent, delta, file):
                digest.update(piece)
                out.write(piece)
    if digest.hexdigest() != sha256:
        raise _corrupt(delta, "does not come to the file that the manifest names")


def _pieces(parent: Path, delta: Path, file: BinaryIO) -> Iterator[bytes]:
    """The result, from its beginning to its end."""
    size = _unpack(_U64, file, delta)
    prefix = _read_blob(file, delta, tensors.MAX_HEADER)
    yield prefix
    have = {tensor.name: tensor for tensor in tensors.read_header(parent)[1]}
    old = _data(parent)
    for tensor in tensors.parse_header(prefix, delta, size):
        kind = _unpack(_U8, file, delta)
        if kind == _WHOLE:
            yield _read_blob(file, delta, tensor.end - tensor.start)
            continue
        twin = have.get(tensor.name)
        if kind not in (_SAME, _CHANGED) or twin is None or (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
            raise _corrupt(delta, f"does not say how {tensor.name} is made")
        before = _elements(old, twin)
        for start in range(0, len(before), _RUN):
            run = before[start : start + _RUN]
            yield (_read_run(file, delta, run) if kind == _CHANGED else run).tobytes()
    if file.read(1):
        raise _corrupt(delta, "goes on after its end")


def _ahead(pool: Executor, runs: Iterator[tuple[_Array, _Array]]) -> Iterator[bytes]:
    """The runs as they are written, in their order; a few are packed ahead, and no more, for the memory they take."""
    packing: deque[Future[bytes]] = deque()
    for before, after in runs:
        packing.append(pool.submit(_run, before, after))
        if len(packing) > 2 * _THREADS:
            yield packing.popleft().result()
    while packing:
        yield packing.popleft().result()


def _run(before: _Array, after: _Array) -> bytes:
    indices = np.flatnonzero(before != after)
    if not len(indices):
        return _UNCHANGED
    gaps = np.diff(indices, prepend=-1) - 1
    largest = int(gaps.max())
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    change = after[indices] - before[indices]  # modulo 2 to the width
    signed = change.view(f"i{change.itemsize}")
    zigzag = (change << change.dtype.type(1)) ^ (signed >> (8 * change.itemsize - 1)).view(change.dtype)
    planes = _planes(gaps.astype(_KINDS[width])) + _planes(zigzag)
    return _U8.pack(width) + _U32.pack(len(indices)) + _blob(planes)


def _read_run(file: BinaryIO, delta: Path, before: _Array) -> _Array:
    width = _unpack(_U8, file, delta)
    if not width:
        return before
    count = _unpack(_U32, file, delta)
    if width not in (1, 2, 4) or not 1 <= count <= len(before):
        raise _corrupt(delta, "has a run of changes that cannot be")
    data = np.frombuffer(_read_blob(file, delta, count * (width + before.itemsize), exactly=True), np.uint8)
    gaps = _unplanes(data[: count * width], width)
    zigzag = _unplanes(data[count * width :], before.itemsize)
    indices = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if indices[-1] >= len(before):
        raise _corrupt(delta, "changes elements that there are not")
    one = zigzag.dtype.type(1)
    change = (zigzag >> one) ^ (~(zigzag & one) + one)
    after = np.array(before)
    after[indices] += change
    return after


def _planes(numbers: _Array) -> bytes:
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T).tobytes()


def _unplanes(data: _Array, width: int) -> _Array:
    numbers: _Array = np.ascontiguousarray(data.reshape(width, -1).T).view(_KINDS[width])
    return numbers[:, 0]


def _elements(data: _Array, tensor: Tensor) -> _Array:
    """[elements] of a tensor as unsigned integers."""
    # Float formats of one byte, booleans and what is yet to be invented are compared byte by byte.
    return data[tensor.start : tensor.end].view(_KINDS[tensors.WIDTHS.get(tensor.dtype, 1)])


def _data(path: Path) -> _Array:
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _blob(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    packed = packer.compress(data) + packer.flush()
    return _U64.pack(len(packed)) + packed


def _read_blob(file: BinaryIO, delta: Path, size: int, *, exactly: bool = False) -> bytes:
    """The bytes of a blob, `size` at the most: a delta cannot ask for more memory than the result has."""
    length = _unpack(_U64, file, delta)
    if length > delta.stat().st_size:
        raise _corrupt(delta, "is cut off")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(file.read(length), size + 1)
    except zlib.error as error:
        raise _corrupt(delta, f"cannot be unpacked ({error})") from error
    if not unpacker.eof or len(data) > size or (exactly and len(data) != size):
        raise _corrupt(delta, "does not unpack to what it should")
    return data


def _unpack(of: struct.Struct, file: BinaryIO, delta: Path) -> int:
    data = file.read(of.size)
    if len(data) != of.size:
        raise _corrupt(delta, "is cut off")
    number: int = of.unpack(data)[0]
    return number


def _corrupt(delta: Path, fault: str) -> errors.CorruptCheckpoint:
    return errors.CorruptCheckpoint(
        f"{delta.parent.name}/{delta.name} {fault}.", remedy="The full weights beside it are used instead."
    )
