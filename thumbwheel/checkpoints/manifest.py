"""What a version says it is: its name, its manifest as signed bytes, and the files it may hold.

A version is a folder with `manifest.json`, `manifest.sig` and exactly the files that the manifest names. The signature
is over the bytes of `manifest.json` as they lie on the disk, so nothing is parsed before it is known to be ours.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import json_format

from thumbwheel import errors, files
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.v1.rollout_pb2 import CheckpointFile, CheckpointManifest, ModelRole

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"

# Weights are safetensors; everything else is text or a tokenizer's table. What could carry code has no place here.
ALLOWED_SUFFIXES = (".safetensors", ".delta", ".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".tiktoken")

_ALGORITHM = "ed25519"
_PREFIXES = {ModelRole.MODEL_ROLE_POLICY: "policy", ModelRole.MODEL_ROLE_REWARD: "reward"}
_ROLES = {prefix: role for role, prefix in _PREFIXES.items()}
_NAME = re.compile(rf"({'|'.join(_ROLES)})-(\d{{6,18}})")


def version_name(role: ModelRole.ValueType, sequence: int) -> str:
    """The name of a version, such as "policy-000003". Raises `errors.InvalidArgument`."""
    if role not in _PREFIXES:
        raise errors.InvalidArgument("is no role that has versions.", field="role", remedy="Use policy or reward.")
    if sequence < 0:
        raise errors.InvalidArgument(f"is {sequence}.", field="sequence", remedy="Versions count from 0.")
    return f"{_PREFIXES[role]}-{sequence:06d}"


def parse_version(version: str) -> tuple[ModelRole.ValueType, int]:
    """The role and sequence in a version's name. Raises `errors.InvalidArgument`."""
    match = _NAME.fullmatch(version)
    if match is None or version_name(_ROLES[match[1]], int(match[2])) != version:
        raise errors.InvalidArgument(
            f"{version[:64]!r} is no version's name.", field="version", remedy="Names look like policy-000003."
        )
    return _ROLES[match[1]], int(match[2])


def to_json(manifest: CheckpointManifest) -> bytes:
    """The manifest as JSON: the same bytes for the same manifest."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, sort_keys=True, indent=2)
    return text.encode() + b"\n"


def sign(data: bytes, signer: ManifestSigner) -> bytes:
    """The content of `manifest.sig`: one line of algorithm, key id and base64 signature."""
    return f"{_ALGORITHM} {signer.key_id} {base64.b64encode(signer.sign(data)).decode()}\n".encode()


def read(folder: Path, verifier: ManifestVerifier) -> tuple[CheckpointManifest, bytes]:
    """The manifest of the version in `folder` and its exact bytes, once the signature holds. Looks at no other file.

    Raises `errors.CorruptCheckpoint` naming the file.
    """
    version = folder.name
    data, line = _read_small(folder, MANIFEST), _read_small(folder, SIGNATURE)
    key_id, signature = _parse_signature(version, line)
    try:
        verifier.verify(data, signature, key_id)
    except errors.PermissionDenied as error:
        raise corrupt(version, MANIFEST, error.message, remedy=error.remedy) from error
    try:
        # Fields added by a newer trainer are signed by it too: they do not stop an older server.
        manifest = json_format.Parse(data, CheckpointManifest(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise corrupt(version, MANIFEST, f"is signed, but no manifest: {error}") from error
    role, sequence = parse_version(version)
    if (manifest.version, manifest.role, manifest.sequence) != (version, role, sequence):
        raise corrupt(version, MANIFEST, f"belongs to {manifest.version}: the folder was renamed or copied")
    if manifest.key_id != key_id:
        raise corrupt(version, SIGNATURE, f"names key {key_id}, the manifest names {manifest.key_id!r}")
    return manifest, data


def check_files(folder: Path, manifest: CheckpointManifest, *, without: str | None = None) -> None:
    """Returns where `folder` holds exactly what `manifest` says, byte for byte; but for files whose names end in
    `without`, which are not to be there.

    Raises `errors.CorruptCheckpoint` naming the first file that is missing, extra or altered. Cheap checks come first.
    """
    version = folder.name
    named = {file.path: file for file in manifest.files if without is None or not file.path.endswith(without)}
    found = list_files(folder) - {MANIFEST, SIGNATURE}
    for path in sorted(named.keys() - found):
        raise corrupt(version, path, "is missing")
    for path in sorted(found - named.keys()):
        raise corrupt(version, path, "is not in the manifest")
    for path, file in named.items():
        require_allowed(version, path)
        size = (folder / path).stat().st_size
        if size != file.size:
            raise corrupt(version, path, f"has {size:,} bytes instead of {file.size:,}")
    for path, file in named.items():
        if files.sha256(folder / path) != file.sha256:
            raise corrupt(version, path, "was altered: its SHA-256 is not the manifest's")


def describe_files(folder: Path, hashed: Mapping[str, str]) -> list[CheckpointFile]:
    """Path, size and hash of every file under `folder`, sorted by path; some are `hashed` already. Raises
    `errors.CorruptCheckpoint` for a file that a version may not hold.
    """
    described = []
    for path in sorted(list_files(folder)):
        if path in (MANIFEST, SIGNATURE):
            raise corrupt(folder.name, path, "is the store's to write", remedy="Write it under another name.")
        require_allowed(folder.name, path)
        file = folder / path
        described.append(
            CheckpointFile(path=path, size=file.stat().st_size, sha256=hashed.get(path) or files.sha256(file))
        )
    return described


def list_files(folder: Path) -> set[str]:
    """Paths of all files under `folder`, with forward slashes. Raises `errors.CorruptCheckpoint` for a symbolic link, a
    device or anything else that is neither file nor folder: it could lead out of the version.
    """
    found = set()
    for where, folders, names in os.walk(folder, followlinks=False):
        for name in folders + names:
            path = Path(where, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(relative)
            elif not stat.S_ISDIR(mode):
                raise corrupt(folder.name, relative, "is neither a file nor a folder")
    return found


def require_allowed(version: str, path: str) -> None:
    """Raises `errors.CorruptCheckpoint` for a kind of file that a version may not hold, such as pickled weights."""
    if not path.endswith(ALLOWED_SUFFIXES):
        raise corrupt(
            version,
            path,
            "is of a kind that no version may hold",
            remedy=f"Weights are safetensors; allowed are {', '.join(ALLOWED_SUFFIXES)}.",
        )


def corrupt(version: str, path: str, fault: str, *, remedy: str = "") -> errors.CorruptCheckpoint:
    """The error for a fault in a file of a version."""
    printable = path.encode("utf-8", "backslashreplace").decode()
    return errors.CorruptCheckpoint(
        f"{version}/{printable} {fault.rstrip('.')}.",
        remedy=remedy or f"Restore {version} from a copy, or remove its folder from the store.",
    )


def _read_small(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise corrupt(folder.name, name, "is not a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise corrupt(folder.name, name, "is missing") from None


def _parse_signature(version: str, line: bytes) -> tuple[str, bytes]:
    try:
        algorithm, key_id, encoded = line.decode("ascii").split()
        signature = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise corrupt(version, SIGNATURE, "is not a signature") from None
    if algorithm != _ALGORITHM:
        raise corrupt(version, SIGNATURE, f"is of kind {algorithm[:32]!r}, not {_ALGORITHM}")
    return key_id, signature
