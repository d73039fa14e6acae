"""The store: a version is there whole and true, or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from thumbwheel import errors, files
from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
from thumbwheel.checkpoints import manifest as manifests
from thumbwheel.checkpoints.store import LocalStore, VerifiedVersion
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

POLICY, REWARD, ANY = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD, ModelRole.MODEL_ROLE_UNSPECIFIED


@pytest.fixture
def signer(tmp_path: Path) -> ManifestSigner:
    create_keys(tmp_path / "keys")
    return ManifestSigner.load(tmp_path / "keys")


@pytest.fixture
def store(tmp_path: Path, signer: ManifestSigner) -> LocalStore:
    return LocalStore(tmp_path / "store", ManifestVerifier.load(tmp_path / "keys"))


def a_manifest(sequence: int = 1, role: ModelRole.ValueType = POLICY, parent: str = "") -> CheckpointManifest:
    name = manifests.version_name(role, sequence)
    return CheckpointManifest(version=name, role=role, sequence=sequence, parent=parent, base_model="tiny")


def writer(value: float = 1.0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file({"weight": np.full((64,), value, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"hidden_size": 8}')
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/merges.txt").write_text("a b\n")

    return write


def listing(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))


def test_a_published_version_loads(store: LocalStore, signer: ManifestSigner) -> None:
    published = store.publish(a_manifest(), writer(2.5), signer).manifest
    loaded = store.load("policy-000001")
    assert isinstance(loaded, VerifiedVersion)
    assert loaded.manifest == published
    assert loaded.path == store.root / "policy-000001"
    assert [f.path for f in published.files] == ["config.json", "model.safetensors", "tokenizer/merges.txt"]
    assert published.files[0].size == 18
    assert published.files[0].sha256 == hashlib.sha256(b'{"hidden_size": 8}').hexdigest()
    assert published.key_id == signer.key_id
    assert published.created_at.seconds > 1_700_000_000
    assert loaded.manifest_sha256 == hashlib.sha256((loaded.path / "manifest.json").read_bytes()).hexdigest()
    assert load_file(loaded.path / "model.safetensors")["weight"][0] == 2.5
    assert listing(store.root / ".staging") == []


def test_what_was_hashed_while_it_was_written_is_taken_at_its_word_until_it_is_loaded(
    store: LocalStore, signer: ManifestSigner
) -> None:
    def write(folder: Path) -> dict[str, str]:
        writer(1.0)(folder)
        return {"config.json": hashlib.sha256(b"something else").hexdigest()}

    store.publish(a_manifest(), write, signer)
    with pytest.raises(errors.CorruptCheckpoint, match=r"config\.json was altered"):
        store.load("policy-000001")


def test_servers_of_another_user_can_read_what_was_written_for_its_owner_only(
    store: LocalStore, signer: ManifestSigner
) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o600)

    store.publish(a_manifest(), write, signer)
    modes = {p.stat().st_mode & 0o777 for p in (store.root / "policy-000001").iterdir()}
    assert modes == {0o644}


def test_publishing_again_changes_nothing(store: LocalStore, signer: ManifestSigner) -> None:
    first = store.publish(a_manifest(), writer(1.0), signer)
    called: list[Path] = []
    assert store.publish(a_manifest(), called.append, signer) == first
    assert called == []


def test_of_two_publishers_at_once_one_wins_and_both_return_it(store: LocalStore, signer: ManifestSigner) -> None:
    together = threading.Barrier(4, timeout=30)

    def publish(value: float) -> CheckpointManifest:
        def write(folder: Path) -> None:
            together.wait()
            writer(value)(folder)

        return store.publish(a_manifest(), write, signer).manifest

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(publish, [1.0, 2.0, 3.0, 4.0]))
    assert all(r == results[0] for r in results)
    assert store.load("policy-000001").manifest == results[0]
    assert listing(store.root / ".staging") == []


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_staging_that_another_publisher_clears_away_is_made_again(
    store: LocalStore, signer: ManifestSigner, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Between making it and locking it, it looks like what a dead publisher has left."""
    module = os if before == "open" else fcntl
    original = getattr(module, before)
    cleared: list[Path] = []

    def after_another(*args: Any, **kwargs: Any) -> Any:
        if not cleared:
            cleared.extend((store.root / ".staging").iterdir())
            for folder in cleared:
                folder.rmdir()
        return original(*args, **kwargs)

    (store.root / ".staging").mkdir(parents=True)
    monkeypatch.setattr(store, "_remove_dead_stagings", lambda: monkeypatch.setattr(module, before, after_another))
    published = store.publish(a_manifest(), writer(1.0), signer).manifest
    assert len(cleared) == 1
    assert store.load("policy-000001").manifest == published
    assert listing(store.root / ".staging") == []


def test_versions_are_listed_newest_first_by_role(store: LocalStore, signer: ManifestSigner) -> None:
    assert store.versions(POLICY) == []
    assert store.latest(POLICY) is None
    for sequence in (2, 10, 0):
        store.publish(a_manifest(sequence), writer(), signer)
    store.publish(a_manifest(7, REWARD), writer(), signer)
    (store.root / "notes").mkdir()
    assert [m.version for m in store.versions(POLICY)] == ["policy-000010", "policy-000002", "policy-000000"]
    assert [m.version for m in store.versions(REWARD)] == ["reward-000007"]
    assert [m.sequence for m in store.versions(ANY)] == [10, 7, 2, 0]
    latest = store.latest(POLICY)
    assert latest is not None
    assert latest.version == "policy-000010"


def test_a_version_with_a_bad_manifest_is_left_out_and_logged(
    store: LocalStore, signer: ManifestSigner, caplog: pytest.LogCaptureFixture
) -> None:
    for sequence in (1, 2):
        store.publish(a_manifest(sequence), writer(), signer)
    (store.root / "policy-000002/manifest.json").write_text("{}")
    with caplog.at_level(logging.ERROR):
        assert [m.version for m in store.versions(POLICY)] == ["policy-000001"]
    assert "policy-000002/manifest.json the signature is not" in caplog.text


def test_an_unknown_version(store: LocalStore) -> None:
    with pytest.raises(errors.NotFound, match="no version policy-000009"):
        store.load("policy-000009")
    with pytest.raises(errors.InvalidArgument):
        store.load("../policy-000009")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def alter_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def add_a_file(folder: Path) -> None:
    (folder / "tokenizer/extra.json").write_text("{}")


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def link_a_file(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def alter_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"tiny"', '"huge"'))


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def remove_the_signature(folder: Path) -> None:
    (folder / "manifest.sig").unlink()


def garble_the_signature(folder: Path) -> None:
    (folder / "manifest.sig").write_bytes(b"\xff\x00")


def change_the_algorithm(folder: Path) -> None:
    text = (folder / "manifest.sig").read_text()
    (folder / "manifest.sig").write_text(text.replace("ed25519", "none"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"policy-000001/model\.safetensors has 100 bytes instead of \d+\."),
        (alter_a_byte, r"policy-000001/model\.safetensors was altered"),
        (add_a_file, r"policy-000001/tokenizer/extra\.json is not in the manifest"),
        (remove_a_file, r"policy-000001/config\.json is missing"),
        (link_a_file, r"policy-000001/config\.json is neither a file nor a folder"),
        (alter_the_manifest, r"policy-000001/manifest\.json the signature is not key \w+'s over these bytes"),
        (remove_the_manifest, r"policy-000001/manifest\.json is missing"),
        (remove_the_signature, r"policy-000001/manifest\.sig is missing"),
        (garble_the_signature, r"policy-000001/manifest\.sig is not a signature"),
        (change_the_algorithm, r"policy-000001/manifest\.sig is of kind 'none', not ed25519"),
    ],
)
def test_a_damaged_version_is_refused_with_file_and_remedy(
    store: LocalStore, signer: ManifestSigner, damage: Callable[[Path], None], message: str
) -> None:
    store.publish(a_manifest(), writer(), signer)
    damage(store.root / "policy-000001")
    with pytest.raises(errors.CorruptCheckpoint, match=message) as caught:
        store.load("policy-000001")
    assert "policy-000001" in caught.value.remedy or "manifest.pub" in caught.value.remedy
    with pytest.raises(errors.CorruptCheckpoint, match=message):
        store.publish(a_manifest(), writer(), signer)


def test_a_version_of_another_trainer_is_refused(store: LocalStore, signer: ManifestSigner, tmp_path: Path) -> None:
    store.publish(a_manifest(), writer(), signer)
    create_keys(tmp_path / "others")
    other = LocalStore(store.root, ManifestVerifier.load(tmp_path / "others"))
    with pytest.raises(errors.CorruptCheckpoint, match=f"signed by key '{signer.key_id}'"):
        other.load("policy-000001")
    with pytest.raises(errors.FailedPrecondition, match="is not the one that"):
        other.publish(a_manifest(2), writer(), signer)


def test_a_version_under_another_name_is_refused(store: LocalStore, signer: ManifestSigner) -> None:
    store.publish(a_manifest(), writer(), signer)
    (store.root / "policy-000001").rename(store.root / "policy-000005")
    with pytest.raises(errors.CorruptCheckpoint, match="belongs to policy-000001: the folder was renamed"):
        store.load("policy-000005")


def test_a_manifest_may_not_lead_out_of_its_folder(store: LocalStore, signer: ManifestSigner) -> None:
    store.publish(a_manifest(), writer(), signer)
    folder = store.root / "policy-000001"
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][0]["path"] = "../config.json"
    (folder / "config.json").rename(store.root / "config.json")
    data = json.dumps(content).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(manifests.sign(data, signer))
    with pytest.raises(errors.CorruptCheckpoint, match=r"policy-000001/\.\./config\.json is missing"):
        store.load("policy-000001")


def test_a_newer_trainers_fields_do_not_stop_an_older_server(store: LocalStore, signer: ManifestSigner) -> None:
    store.publish(a_manifest(), writer(), signer)
    folder = store.root / "policy-000001"
    data = json.dumps({**json.loads((folder / "manifest.json").read_text()), "novelty": 1}).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(manifests.sign(data, signer))
    assert store.load("policy-000001").manifest.base_model == "tiny"


def test_pickled_weights_are_not_published(store: LocalStore, signer: ManifestSigner) -> None:
    with pytest.raises(errors.CorruptCheckpoint, match=r"policy-000001/pytorch_model\.bin is of a kind"):
        store.publish(a_manifest(), lambda folder: _put(folder / "pytorch_model.bin", b"\x80"), signer)
    assert listing(store.root) == [".staging"]


def test_the_manifest_is_the_stores_to_write(store: LocalStore, signer: ManifestSigner) -> None:
    with pytest.raises(errors.CorruptCheckpoint, match=r"manifest\.json is the store's to write"):
        store.publish(a_manifest(), lambda folder: _put(folder / "manifest.json", b"{}"), signer)


def test_a_name_that_is_not_its_sequences_is_refused(store: LocalStore, signer: ManifestSigner) -> None:
    manifest = a_manifest()
    manifest.version = "policy-000002"
    with pytest.raises(errors.InvalidArgument, match=r"manifest\.version: 'policy-000002' is not policy-000001"):
        store.publish(manifest, writer(), signer)


def test_a_writer_that_fails_leaves_nothing(store: LocalStore, signer: ManifestSigner) -> None:
    def write(folder: Path) -> None:
        writer()(folder)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        store.publish(a_manifest(), write, signer)
    assert listing(store.root) == [".staging"]


def fill_the_disk(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"x" * 5000)
    Path("/dev/full").write_bytes(b"x")  # the kernel answers ENOSPC to every write


def fill_the_disk_from_native_code(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"x" * 5000)
    raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors' words


@pytest.mark.parametrize("write", [fill_the_disk, fill_the_disk_from_native_code])
def test_a_full_disk_names_folder_and_bytes_and_leaves_nothing(
    store: LocalStore, signer: ManifestSigner, write: Callable[[Path], None]
) -> None:
    with pytest.raises(errors.NoSpace, match=rf"No space in {store.root} for policy-000001: at least 5,000 bytes"):
        store.publish(a_manifest(), write, signer)
    assert listing(store.root) == [".staging"]
    assert store.publish(a_manifest(), writer(), signer).manifest.version == "policy-000001"


def test_a_disk_that_is_full_only_when_synced(
    store: LocalStore, signer: ManifestSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(errors.NoSpace):
            store.publish(a_manifest(), writer(), signer)
    assert listing(store.root) == [".staging"]


def test_too_little_space_for_a_successor_is_said_before_writing(
    store: LocalStore, signer: ManifestSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(a_manifest(1), writer(), signer)
    needed = files.tree_size(store.root / "policy-000001")
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    called: list[Path] = []
    with pytest.raises(
        errors.NoSpace, match=f"for policy-000002: at least {needed:,} bytes needed, {needed - 1:,} free"
    ):
        store.publish(a_manifest(2, parent="policy-000001"), called.append, signer)
    assert called == []


def test_what_a_killed_publisher_left_is_removed_and_a_living_ones_is_not(
    store: LocalStore, signer: ManifestSigner, tmp_path: Path
) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from typing import Any
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole
def write(folder):
    (folder / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
keys = Path(sys.argv[1])
manifest = CheckpointManifest(version="policy-000001", role=ModelRole.MODEL_ROLE_POLICY, sequence=1)
LocalStore(Path(sys.argv[2]), ManifestVerifier.load(keys)).publish(manifest, write, ManifestSigner.load(keys))
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "keys"), str(store.root)]
    assert subprocess.run(arguments, timeout=60, check=False).returncode == -9
    assert len(list((store.root / ".staging").iterdir())) == 1

    def write(folder: Path) -> None:
        assert [p.name for p in (store.root / ".staging").iterdir()] == [folder.parent.name]
        store.publish(a_manifest(2), writer(), signer)
        assert folder.is_dir()
        writer()(folder)

    store.publish(a_manifest(1), write, signer)
    assert [m.version for m in store.versions(POLICY)] == ["policy-000002", "policy-000001"]
    assert listing(store.root / ".staging") == []


def test_a_version_is_synced_before_it_appears(
    store: LocalStore, signer: ManifestSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    store.publish(a_manifest(), writer(), signer)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"model.safetensors", "config.json", "merges.txt", "tokenizer", "manifest.json", "manifest.sig"} < set(
        before
    )
    assert before[-1] == "policy-000001"
    assert after == ["store"]


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
