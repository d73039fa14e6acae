"""Versions on a server's own disk: verified on the way, made from deltas where there are any, safe from the store."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.unit.checkpoints.test_delta import write_file
from thumbwheel import errors
from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
from thumbwheel.checkpoints import delta
from thumbwheel.checkpoints.held import HeldVersions
from thumbwheel.checkpoints.store import LocalStore, version_name
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

POLICY = ModelRole.MODEL_ROLE_POLICY
WEIGHTS = "model.safetensors"


class Home:
    """A store whose versions differ in a few weights, and where each has a delta against the one before."""

    def __init__(self, folder: Path) -> None:
        create_keys(folder / "keys")
        self.folder = folder
        self.store = LocalStore(folder / "store", ManifestVerifier.load(folder / "keys"))

    def publish(self, sequence: int, *, with_delta: bool = True) -> str:
        """Publishes a version; its weights are random, and one in a hundred is another than in the one before."""
        version = version_name(POLICY, sequence)
        parent = version_name(POLICY, sequence - 1) if sequence else ""

        def write(folder: Path) -> None:
            weights = np.random.default_rng(0).integers(0, 1 << 14, 100_000, np.uint16)
            weights[:: 100 + sequence] += np.uint16(sequence)
            write_file(folder / WEIGHTS, {"w": ("BF16", weights.tobytes())})
            (folder / "config.json").write_text("{}")
            (folder / "tokenizer.json").write_text("{}")
            if with_delta and parent:
                path = folder / (WEIGHTS + delta.SUFFIX)
                delta.write(self.store.root / parent / WEIGHTS, folder / WEIGHTS, path)

        manifest = CheckpointManifest(version=version, role=POLICY, sequence=sequence, parent=parent)
        self.store.publish(manifest, write, ManifestSigner.load(self.folder / "keys"))
        return version

    def held(self) -> HeldVersions:
        """As a server would have them."""
        return HeldVersions(self.folder / "held", self.store)

    def damage(self, version: str, name: str, content: bytes | None) -> None:
        """Changes a file of the store, or removes it."""
        path = self.store.root / version / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    def weights(self, version: str) -> bytes:
        """As the store has them."""
        return (self.store.root / version / WEIGHTS).read_bytes()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """With two versions."""
    home = Home(tmp_path)
    home.publish(0)
    home.publish(1)
    return home


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}


def test_a_version_is_brought_whole(home: Home) -> None:
    held = home.held()
    version = held.fetch("policy-000001", timeout=10)
    assert version.manifest == home.store.load("policy-000001").manifest
    assert version.manifest_sha256 == home.store.load("policy-000001").manifest_sha256
    assert names(version.path) == {"manifest.json", "manifest.sig", "config.json", "tokenizer.json", WEIGHTS}
    assert (version.path / WEIGHTS).read_bytes() == home.weights("policy-000001")
    assert held.fetch("policy-000001", timeout=10) is version


def test_who_holds_the_parent_reads_the_delta_alone(home: Home) -> None:
    held = home.held()
    held.fetch("policy-000000", timeout=10)
    whole = home.weights("policy-000001")
    home.damage("policy-000001", WEIGHTS, None)
    version = held.fetch("policy-000001", timeout=10)
    assert (version.path / WEIGHTS).read_bytes() == whole
    assert names(version.path) == {"manifest.json", "manifest.sig", "config.json", "tokenizer.json", WEIGHTS}


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_a_delta_that_is_of_no_use_gives_way_to_the_full_weights(
    home: Home, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    held = home.held()
    held.fetch("policy-000000", timeout=10)
    name = WEIGHTS + delta.SUFFIX
    whole = (home.store.root / "policy-000001" / name).read_bytes()
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    home.damage("policy-000001", name, {"flipped": flipped, "torn": whole[:-5], "gone": None}[damage])
    with caplog.at_level(logging.WARNING):
        version = held.fetch("policy-000001", timeout=10)
    assert (version.path / WEIGHTS).read_bytes() == home.weights("policy-000001")
    assert "the delta is of no use" in caplog.text


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("flipped", "was altered"),
        ("torn", "bytes or more instead of"),
        ("longer", "bytes or more"),
        ("gone", "is missing"),
    ],
)
def test_a_version_that_is_not_what_it_says_is_not_held(home: Home, damage: str, fault: str) -> None:
    held = home.held()
    whole = home.weights("policy-000000")
    flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    content = {"flipped": flipped, "torn": whole[:-100], "longer": whole + b"\0", "gone": None}[damage]
    home.damage("policy-000000", WEIGHTS, content)
    with pytest.raises(errors.CorruptCheckpoint, match=fault):
        held.fetch("policy-000000", timeout=10)
    assert held.left_here() == []
    assert names(held.folder / ".incoming") == set()


def test_a_signature_that_does_not_hold_is_seen_before_anything_is_copied(home: Home) -> None:
    held = home.held()
    text = (home.store.root / "policy-000000/manifest.json").read_bytes()
    home.damage("policy-000000", "manifest.json", text.replace(b"policy", b"reward"))
    with pytest.raises(errors.CorruptCheckpoint, match=r"manifest\.json"):
        held.fetch("policy-000000", timeout=10)


def test_a_store_that_is_away_is_no_fault_of_the_version(home: Home) -> None:
    held = home.held()
    home.store.root.rename(home.folder / "elsewhere")
    with pytest.raises(errors.Unavailable, match="policy-000001"):
        held.fetch("policy-000001", timeout=10)
    (home.folder / "elsewhere").rename(home.store.root)
    assert held.fetch("policy-000001", timeout=10).manifest.sequence == 1


def test_a_slow_store_has_a_deadline(home: Home) -> None:
    with pytest.raises(errors.DeadlineExceeded, match="was not read in time"):
        home.held().fetch("policy-000001", timeout=0.0)


def test_what_is_held_outlives_the_store(home: Home) -> None:
    held = home.held()
    held.fetch("policy-000001", timeout=10)
    held.close()
    shutil.rmtree(home.store.root)
    again = home.held()
    assert again.left_here() == ["policy-000001"]
    assert again.load("policy-000001").manifest.sequence == 1
    (again.folder / "policy-000001" / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(errors.CorruptCheckpoint, match="4 bytes instead of"):
        again.load("policy-000001")


def test_two_processes_have_a_place_each(home: Home) -> None:
    one, two = home.held(), home.held()
    assert one.folder != two.folder
    one.fetch("policy-000000", timeout=10)
    assert two.left_here() == []
    place = one.folder
    one.close()
    assert home.held().folder == place


def test_only_what_is_named_is_kept(home: Home) -> None:
    held = home.held()
    for sequence in (2, 3):
        home.publish(sequence)
    for sequence in range(4):
        held.fetch(version_name(POLICY, sequence), timeout=10)
    held.keep_only({"policy-000003", "policy-000001"})
    assert held.left_here() == ["policy-000003", "policy-000001"]
    assert held.fetch("policy-000002", timeout=10).manifest.sequence == 2
