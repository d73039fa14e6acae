"""The store of versions on a local or shared file system: immutable, signed, all or nothing.

    root/policy-000003/                a version: manifest.json, manifest.sig, and the files the manifest names
    root/.staging/<id>/policy-000004/  one being written; <id> is locked by its writer, and removed when that is dead

A version appears by one rename of a folder that is whole, hashed, signed and synced, and never changes afterwards. When
it is old its weights may be removed: what it learnt from, and whose child it is, is known for ever.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from uuid_utils import uuid7

from thumbwheel import errors, files
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.checkpoints import manifest as manifests
from thumbwheel.checkpoints.manifest import MANIFEST, SIGNATURE, parse_version, version_name
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

__all__ = ["SAMPLES", "LocalStore", "VerifiedVersion", "parse_version", "version_name"]

_log = logging.getLogger(__name__)

SAMPLES = "samples.txt"
"""The sorted ids of the samples that a version learnt from since its parent, one a line; written by the trainer."""
THINNED = "thinned"
"""In the folder of a version without weights."""
_KEPT = (manifests.MANIFEST, manifests.SIGNATURE, SAMPLES, THINNED)
_STAGING = ".staging"

Write = Callable[[Path], Mapping[str, str] | None]
"""Fills a folder with a version's files. Returns the SHA-256 of those that it has hashed, by their paths in it."""


@dataclass(frozen=True)
class VerifiedVersion:
    """A version whose signature and every byte have been checked."""

    path: Path
    manifest: CheckpointManifest
    manifest_sha256: str
    """SHA-256 of manifest.json, as 64 hexadecimal digits."""


class LocalStore:
    """Versions in a folder. Thread-safe, and safe between processes that share the folder."""

    def __init__(self, root: Path, verifier: ManifestVerifier) -> None:
        self.root = root
        self._verifier = verifier

    def publish(self, manifest: CheckpointManifest, write: Write, signer: ManifestSigner) -> VerifiedVersion:
        """Makes a version: `write` fills a staging folder, which is hashed, signed, synced and renamed. What `write`
        has hashed already is not hashed again.

        `manifest` comes without files, key id and, where it is to be now, `created_at`; the complete one is returned. A
        version that is there already and verifies is returned as it is, and `write` is not called, or what it wrote is
        dropped: publishing twice, or from two processes at once, makes one version.

        Raises `errors.InvalidArgument` for a name that is not the role's and sequence's, `errors.FailedPrecondition`
        for a key that this store does not trust, `errors.CorruptCheckpoint` for a file that a version may not hold or a
        version that is there and does not verify, and `errors.NoSpace`. Nothing is left behind by a failure.
        """
        version = manifest.version
        if version != version_name(manifest.role, manifest.sequence):
            raise errors.InvalidArgument(
                f"{version[:64]!r} is not {version_name(manifest.role, manifest.sequence)}.",
                field="manifest.version",
                remedy="Name it after its role and sequence.",
            )
        if signer.key_id != self._verifier.key_id:
            raise errors.FailedPrecondition(
                f"The manifest key {signer.key_id} is not the one that {self.root} trusts, {self._verifier.key_id}.",
                remedy="Use manifest.key and manifest.pub of one deployment.",
            )
        if (self.root / version).exists():
            return self.load(version)
        needed = self._size(manifest.parent)
        with files.space_errors(_existing(self.root), needed, version):
            self._remove_dead_stagings()
            files.require_space(self.root, needed, version)
            with self._staging(version) as folder:
                # Measured before the staging folder is cleared away, for the message.
                with files.space_errors(self.root, lambda: max(needed, files.tree_size(folder)), version):
                    complete, sha256 = _fill(folder, manifest, write, signer)
                try:
                    folder.rename(self.root / version)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    return self.load(version)  # another publisher was first
            files.sync(self.root)
        return VerifiedVersion(self.root / version, complete, sha256)

    def versions(self, role: ModelRole.ValueType) -> list[CheckpointManifest]:
        """Manifests of a role's versions, newest first; all roles for MODEL_ROLE_UNSPECIFIED.

        Only signatures are checked here: `load` a version before using it. One whose manifest does not hold is left out
        and logged as an error.
        """
        return list(self._manifests(role))

    def latest(self, role: ModelRole.ValueType) -> CheckpointManifest | None:
        """The manifest of a role's newest version, if there is any."""
        return next(self._manifests(role), None)

    def _manifests(self, role: ModelRole.ValueType) -> Iterator[CheckpointManifest]:
        for folder in self._folders(role):
            try:
                yield manifests.read(folder, self._verifier)[0]
            except errors.CorruptCheckpoint as error:
                _log.error("version left out: %s", error)

    def _folders(self, role: ModelRole.ValueType) -> list[Path]:
        """Those of a role's versions, newest first, by their names."""
        found = []
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            try:
                its_role, sequence = parse_version(folder.name)
            except errors.InvalidArgument:
                continue  # the staging area, or nothing of ours
            if role in (ModelRole.MODEL_ROLE_UNSPECIFIED, its_role):
                found.append((sequence, -its_role, folder))
        return [folder for _, _, folder in sorted(found, reverse=True)]

    def load(self, version: str) -> VerifiedVersion:
        """Verifies a version: signature first, then the exact set of files, their sizes and hashes.

        Reads every byte (about 1 GB/s). Raises `errors.InvalidArgument` for what is no version's name,
        `errors.NotFound`, also where its weights were removed, and `errors.CorruptCheckpoint` naming the file.
        """
        folder = self._folder(version)
        if self.is_thin(version):
            raise errors.NotFound(
                f"The weights of {version} were removed from {self.root}: it is not among the newest.",
                remedy="Take a newer version, or put its folder back from a copy; --keep-versions says how many stay.",
            )
        manifest, data = self.read_manifest(folder)
        manifests.check_files(folder, manifest)
        return VerifiedVersion(folder, manifest, files.sha256_bytes(data))

    def describe(self, version: str) -> tuple[CheckpointManifest, bytes, bytes]:
        """A version's manifest, its bytes, and its signature's. The signature holds; no other file has been looked at.

        Raises `errors.InvalidArgument`, `errors.NotFound` and `errors.CorruptCheckpoint`.
        """
        folder = self._folder(version)
        manifest, data = self.read_manifest(folder)
        return manifest, data, (folder / SIGNATURE).read_bytes()

    def read(self, version: str, path: str) -> bytes:
        """A small file of a version, as its manifest says it is; also of one whose weights were removed.

        Raises `errors.InvalidArgument`, `errors.NotFound` and `errors.CorruptCheckpoint`.
        """
        folder = self._folder(version)
        manifest, _ = self.read_manifest(folder)
        wanted = next((file.sha256 for file in manifest.files if file.path == path), "")
        try:
            data = (folder / path).read_bytes()
        except OSError as error:
            raise manifests.corrupt(version, path, f"cannot be read: {error}") from error
        if files.sha256_bytes(data) != wanted:
            raise manifests.corrupt(version, path, "was altered: its SHA-256 is not the manifest's")
        return data

    def is_thin(self, version: str) -> bool:
        """Whether the weights of a version were removed."""
        return (self.root / version / THINNED).exists()

    def thin(self, role: ModelRole.ValueType, *, keep: int, also: Collection[str] = ()) -> list[str]:
        """Removes all but manifest and samples' ids of a role's versions that are not among the newest `keep`, but for
        version 0 and those in `also`. Returns which they were. Raises `OSError`; what is begun is finished next time.
        """
        thinned = []
        for folder in self._folders(role)[keep:]:
            if parse_version(folder.name)[1] == 0 or folder.name in also:
                continue
            left = [path for path in folder.rglob("*") if path.is_file() and path.name not in _KEPT]
            if not left:
                continue
            (folder / THINNED).touch()  # first: what is half removed is not to be taken for damaged
            files.sync(folder)
            for path in left:
                path.unlink(missing_ok=True)
            thinned.append(folder.name)
        return thinned

    def open(self, version: str, path: str) -> BinaryIO:
        """A file of a version, unverified, to be read and closed. Raises `OSError`."""
        return (self.root / version / path).open("rb")

    def read_manifest(self, folder: Path) -> tuple[CheckpointManifest, bytes]:
        """The manifest of the version in any folder and its bytes, once the signature holds.

        Raises `errors.CorruptCheckpoint`.
        """
        return manifests.read(folder, self._verifier)

    def _folder(self, version: str) -> Path:
        parse_version(version)
        folder = self.root / version
        if folder.is_symlink() or not folder.is_dir():
            raise errors.NotFound(
                f"There is no version {version} in {self.root}.", remedy="`thumbwheel versions` lists those there are."
            )
        return folder

    @contextmanager
    def _staging(self, version: str) -> Iterator[Path]:
        """A new staging folder, locked for as long as this process lives; gone afterwards unless it was renamed."""
        outer = self.root / _STAGING / str(uuid7())
        while True:
            outer.mkdir(parents=True)
            # Until it is locked, another publisher may take it for what a dead one has left, and clear it away.
            try:
                descriptor = os.open(outer, os.O_RDONLY)
            except FileNotFoundError:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits at most while another removes this empty folder
            if outer.exists():
                break
            os.close(descriptor)
        try:
            folder = outer / version
            folder.mkdir()
            yield folder
        finally:
            # What cannot be removed now, the next publisher removes.
            shutil.rmtree(outer, ignore_errors=True)
            os.close(descriptor)

    def _remove_dead_stagings(self) -> None:
        """Removes what publishers that died have left. A living one holds the lock of its folder."""
        (self.root / _STAGING).mkdir(parents=True, exist_ok=True)
        for folder in (self.root / _STAGING).iterdir():
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue  # finished this moment
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _log.warning("removing what a publisher that died has left: %s", folder.name)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its publisher lives
            finally:
                os.close(descriptor)

    def _size(self, version: str) -> int:
        """Bytes in a version, 0 where there is none: what its successor is likely to need."""
        if not version:
            return 0
        parse_version(version)
        return files.tree_size(self.root / version)


def _fill(
    folder: Path, manifest: CheckpointManifest, write: Write, signer: ManifestSigner
) -> tuple[CheckpointManifest, str]:
    """Steps 1 to 4 of publishing; the rename is the fifth. Returns the complete manifest, and its file's SHA-256."""
    hashed = write(folder) or {}  # 1
    complete = CheckpointManifest()
    complete.CopyFrom(manifest)
    complete.ClearField("files")
    complete.files.extend(manifests.describe_files(folder, hashed))  # 2
    complete.key_id = signer.key_id
    if not complete.HasField("created_at"):
        complete.created_at.GetCurrentTime()
    data = manifests.to_json(complete)
    files.write_new(folder / MANIFEST, data, mode=0o644)  # 3
    files.write_new(folder / SIGNATURE, manifests.sign(data, signer), mode=0o644)
    for file in complete.files:
        # Libraries write weights for their owner only; servers may run as somebody else.
        (folder / file.path).chmod(0o644)
    files.sync_tree(folder)  # 4
    return complete, files.sha256_bytes(data)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: free space is asked of what exists."""
    return folder if folder.exists() else _existing(folder.parent)
