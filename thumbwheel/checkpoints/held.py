"""The versions that a server holds on its own disk: what it serves, what it served before, and what it takes over next.

    folder/0/                     of the first process; a second one on the same folder has 1/, and so on
        lock                      held for as long as the process lives
        policy-000003/            the version, verified while it was brought here
        .incoming/policy-000004/  being brought

A version is loaded from here and never from the store: what was verified is what is loaded, the store may be away or be
tidied up, and the way back from a swap that fails needs nothing but the local disk. Where the store has a delta against
a version that is held, only the delta is read from the store.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from thumbwheel import errors, files
from thumbwheel.checkpoints import delta
from thumbwheel.checkpoints import manifest as manifests
from thumbwheel.checkpoints.manifest import MANIFEST, SIGNATURE, corrupt, parse_version
from thumbwheel.checkpoints.store import LocalStore, VerifiedVersion
from thumbwheel.v1.rollout_pb2 import CheckpointFile, CheckpointManifest

logger = logging.getLogger(__name__)

_INCOMING = ".incoming"
_CHUNK = 1 << 22
_MOST_PROCESSES = 1000


class HeldVersions:
    """The versions on a server's own disk. Made once a process; `fetch` may be called from any thread, one at a time.

    Raises `errors.FailedPrecondition` where a thousand processes hold versions in `folder` already.
    """

    def __init__(self, folder: Path, store: LocalStore) -> None:
        self._store = store
        self._held: dict[str, VerifiedVersion] = {}
        for slot in range(_MOST_PROCESSES):
            self.folder = folder / str(slot)
            self.folder.mkdir(parents=True, exist_ok=True)
            # Kept open: the lock is the process's for as long as it lives, and nobody's after a `kill -9`.
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                os.close(self._lock)
        else:
            raise errors.FailedPrecondition(f"All places in {folder} are taken.", remedy="Give this server a --home.")
        shutil.rmtree(self.folder / _INCOMING, ignore_errors=True)  # of a process that was killed

    def close(self) -> None:
        """Lets another process have the place, and what lies there."""
        os.close(self._lock)

    def fetch(self, version: str, *, timeout: float) -> VerifiedVersion:
        """Brings a version here, unless it is here, and verifies it on the way: signature, sizes, hashes.

        Raises `errors.CorruptCheckpoint` for a version that is not what its manifest says, `errors.Unavailable` where
        the store cannot be read or has no such version (yet), `errors.DeadlineExceeded` after `timeout` seconds, and
        `errors.NoSpace`. Nothing is left behind by a failure.
        """
        if version in self._held:
            return self._held[version]
        deadline = time.monotonic() + timeout
        incoming = self.folder / _INCOMING / version
        try:
            manifest, data, signature = self._store.describe(version)
            size = sum(file.size for file in manifest.files)
            with files.space_errors(self.folder, size, version):
                files.require_space(self.folder, size, version)
                shutil.rmtree(incoming, ignore_errors=True)
                incoming.mkdir(parents=True)
                self._bring(manifest, incoming, deadline)
                (incoming / MANIFEST).write_bytes(data)
                (incoming / SIGNATURE).write_bytes(signature)
                shutil.rmtree(self.folder / version, ignore_errors=True)
                incoming.rename(self.folder / version)
        except errors.NotFound as error:
            raise errors.Unavailable(error.message, remedy="It is tried again.") from error
        except OSError as error:
            raise errors.Unavailable(
                f"{version} cannot be read from {self._store.root}: {error}.", remedy="It is tried again."
            ) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        self._held[version] = VerifiedVersion(self.folder / version, manifest, files.sha256_bytes(data))
        return self._held[version]

    def load(self, version: str) -> VerifiedVersion:
        """A version that an earlier process has left here, verified anew. Errors as `LocalStore.load`."""
        folder = self.folder / version
        if not folder.is_dir():
            raise errors.NotFound(f"{version} is not held in {self.folder}.")
        manifest, data = self._store.read_manifest(folder)
        manifests.check_files(folder, manifest, without=delta.SUFFIX)
        self._held[version] = VerifiedVersion(folder, manifest, files.sha256_bytes(data))
        return self._held[version]

    def left_here(self) -> list[str]:
        """Names of the versions that lie here, newest first, verified or not."""
        found = []
        for folder in self.folder.iterdir():
            try:
                found.append((parse_version(folder.name), folder.name))
            except errors.InvalidArgument:
                continue
        return [name for _, name in sorted(found, reverse=True)]

    def keep_only(self, versions: Collection[str]) -> None:
        """Removes every other version."""
        for name in self.left_here():
            if name not in versions:
                self._held.pop(name, None)
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _bring(self, manifest: CheckpointManifest, folder: Path, deadline: float) -> None:
        named = {file.path: file for file in manifest.files}
        parent = self._held.get(manifest.parent)
        for path, file in named.items():
            manifests.require_allowed(manifest.version, path)
            if path.startswith("/") or ".." in path.split("/"):
                raise corrupt(manifest.version, path, "leads out of the version")
            if path.endswith(delta.SUFFIX):
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            change = named.get(path + delta.SUFFIX)
            if change is None or parent is None or not self._make(parent, change, file, target, deadline):
                self._copy(manifest.version, file, target, deadline)

    def _make(
        self, parent: VerifiedVersion, change: CheckpointFile, file: CheckpointFile, target: Path, deadline: float
    ) -> bool:
        """Makes a file out of the parent's; False, with a warning, where that does not come to what it should."""
        version = target.parent.name
        packed = target.with_name(target.name + delta.SUFFIX)
        try:
            self._copy(version, change, packed, deadline)
            before = next((its.sha256 for its in parent.manifest.files if its.path == file.path), "")
            delta.apply(parent.path / file.path, packed, target, sha256=file.sha256, parent_sha256=before)
        except errors.CorruptCheckpoint as error:
            logger.warning("the delta is of no use, the full weights are taken: %s", error, extra={"version": version})
            return False
        finally:
            packed.unlink(missing_ok=True)
        return True

    def _copy(self, version: str, file: CheckpointFile, target: Path, deadline: float) -> None:
        """Copies a file from the store. What is written is what was hashed; it is in the page cache afterwards."""
        size = 0
        try:
            source = self._store.open(version, file.path)
        except FileNotFoundError:
            raise corrupt(version, file.path, "is missing") from None
        with source, target.open("wb") as out, files.Digest() as digest:
            while piece := source.read(_CHUNK):
                digest.update(piece)
                size += len(piece)
                if size > file.size:
                    break
                out.write(piece)
                if time.monotonic() > deadline:
                    raise errors.DeadlineExceeded(f"{version}/{file.path} was not read in time.")
        if size != file.size:
            raise corrupt(version, file.path, f"has {size:,} bytes or more instead of {file.size:,}")
        if digest.hexdigest() != file.sha256:
            raise corrupt(version, file.path, "was altered: its SHA-256 is not the manifest's")
