"""What decodes bytes from outside, each as a function of bytes: it returns, or raises one of our own errors.

Anything else that it raises is a bug. `seeds/` holds what each is meant for, to begin from, and whatever broke it once.
Files are decoded in a folder of memory, so that a disk does not slow it down.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from services.collector import ingest
from services.collector.exchange import reading
from services.collector.submission import Checker
from services.policy import sampling
from services.prompts import chat_messages
from thumbwheel import auth, errors, files
from thumbwheel.checkpoints import delta, manifest, tensors
from thumbwheel.stream import deadletter
from thumbwheel.stream.log import Record
from thumbwheel.v1.events_pb2 import ComparisonEvent, VersionEvent
from thumbwheel.v1.policy_pb2 import GenerateRequest, Receipt
from thumbwheel.v1.preference_pb2 import SubmitFeedbackRequest
from trainer.ingest import Encoder

Decode = Callable[[bytes], object]
VERSION = "policy-000001"


def _parsed(kind: type[Message], data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:  # gRPC refuses it before any of our code runs
        raise errors.InvalidArgument(str(error), field="") from error


def _receipts(folder: Path) -> Decode:
    key = auth.ReceiptKey("0123456789abcdef", b"k" * 32)

    def decode(data: bytes) -> object:
        # As it comes, and as it would be were the claims signed: what they hold is decoded then.
        if data[:1] == b"\0":
            return key.verify(
                Receipt(claims=data[1:], key_id=key.key_id, signature=key._mac(data[1:])), field="receipt"
            )
        return key.verify(_parsed(Receipt, data), field="receipt")

    return decode


def _feedback(folder: Path) -> Decode:
    checker = Checker(auth.ReceiptKey("0123456789abcdef", b"k" * 32), 1_000)
    return lambda data: checker.check(_parsed(SubmitFeedbackRequest, data).feedback, tenant="default")


def _record(data: bytes) -> Record:
    """The first byte says whether there is a header, and how long it is."""
    cut = data[0] if data else 0
    headers = (("schema", data[1 : 1 + cut]),) if cut else ()
    return Record("topic", 0, 0, b"key", data[1 + cut :], headers)


def _generations(folder: Path) -> Decode:
    return lambda data: ingest.decode(_record(data))


class _Tokenizer:
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte for byte in text.encode()]}

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> list[int]:
        return [3 + byte for turn in turns for byte in f"{turn['role']}:{turn['content']}".encode()]


def _comparisons(folder: Path) -> Decode:
    encoder = Encoder.__new__(Encoder)  # without a tokenizer of Transformers, which is slow to load
    encoder.tokenizer, encoder._vocab_size, encoder._max_length, encoder._scores_text = _Tokenizer(), 300, 64, False
    return lambda data: encoder.encode(deadletter.decode(ComparisonEvent, _record(data)))


def _versions(folder: Path) -> Decode:
    return lambda data: deadletter.decode(VersionEvent, _record(data))


def _manifests(folder: Path) -> Decode:
    auth.create_keys(folder / "keys")
    signer, verifier = auth.ManifestSigner.load(folder / "keys"), auth.ManifestVerifier.load(folder / "keys")
    version = folder / VERSION
    version.mkdir()

    def decode(data: bytes) -> None:
        """The manifest as it would be were it signed by the trainer; with a zero first, the signature beside it."""
        if data[:1] == b"\0":
            (version / manifest.MANIFEST).write_bytes(b"{}")
            (version / manifest.SIGNATURE).write_bytes(data[1:])
        else:
            (version / manifest.MANIFEST).write_bytes(data)
            (version / manifest.SIGNATURE).write_bytes(manifest.sign(data, signer))
        found, _ = manifest.read(version, verifier)
        manifest.check_files(version, found)

    return decode


def _weights(path: Path, values: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [len(values)], "data_offsets": [0, 2 * len(values)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}H", *values))


def _deltas(folder: Path) -> Decode:
    parent, target, file = folder / "parent.safetensors", folder / "target.safetensors", folder / "x.delta"
    _weights(parent, list(range(64)))
    head, wanted = delta.MAGIC + bytes.fromhex(files.sha256(parent)), "00" * 32

    def decode(data: bytes) -> None:
        file.write_bytes(head + bytes(32) + data)
        delta.apply(parent, file, target, sha256=wanted)

    return decode


def _safetensors(folder: Path) -> Decode:
    path = folder / "model.safetensors"

    def decode(data: bytes) -> None:
        path.write_bytes(data)
        tensors.table(folder)
        tensors.require_finite(path)

    return decode


def _requests(folder: Path) -> Decode:
    def decode(data: bytes) -> object:
        request = _parsed(GenerateRequest, data)
        if request.prompt.WhichOneof("content") == "chat":
            chat_messages(request.prompt.chat, field="prompt.chat")
        return sampling.resolve(request.sampling, max_tokens=256, vocab_size=1_000)

    return decode


def _imports(folder: Path) -> Decode:
    plain, packed = folder / "rows.jsonl", folder / "rows.jsonl.gz"

    def decode(data: bytes) -> object:
        path = packed if data[:2] == b"\x1f\x8b" else plain
        path.write_bytes(data)
        return sum(line.row is not None for line in reading.read(path, "auto"))

    return decode


TARGETS: Mapping[str, Callable[[Path], Decode]] = {
    "receipts": _receipts,
    "feedback": _feedback,
    "generations": _generations,
    "comparisons": _comparisons,
    "versions": _versions,
    "manifests": _manifests,
    "deltas": _deltas,
    "safetensors": _safetensors,
    "requests": _requests,
    "imports": _imports,
}
"""Makes each ready, in a folder of its own."""

EXPECTED = (errors.ThumbwheelError,)


def attempt(decode: Decode, data: bytes) -> bool:
    """Whether it was decoded; False where it was refused. Raises what must not be raised."""
    try:
        decode(data)
    except EXPECTED:
        return False
    return True


def folder() -> Path:
    """A folder in memory, where there is one; `shutil.rmtree` it afterwards."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def discard(path: Path) -> None:
    """Removes what `folder` made."""
    shutil.rmtree(path, ignore_errors=True)
