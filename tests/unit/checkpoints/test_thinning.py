"""Old versions lose their weights, and stay known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checkpoints.test_store import POLICY, REWARD, a_manifest, listing, signer, store, writer
from thumbwheel import errors
from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints.store import SAMPLES, LocalStore

__all__ = ["signer", "store"]


@pytest.fixture
def six(store: LocalStore, signer: ManifestSigner) -> LocalStore:
    """A store with versions 0 to 5 of the policy, and 0 and 1 of the reward model."""
    for role, count in ((POLICY, 6), (REWARD, 2)):
        for number in range(count):

            def write(folder: Path, number: int = number) -> None:
                writer(float(number))(folder)
                (folder / SAMPLES).write_text(f"sample-{number}\n")

            store.publish(a_manifest(number, role), write, signer)
    return store


def names(*numbers: int) -> list[str]:
    return [f"policy-{number:06d}" for number in numbers]


def test_the_newest_stay_and_of_the_others_what_they_learnt_from(six: LocalStore) -> None:
    assert six.thin(POLICY, keep=2, also=["policy-000002"]) == names(3, 1)
    assert six.thin(POLICY, keep=2, also=["policy-000002"]) == [], "once"
    assert [six.is_thin(name) for name in names(0, 1, 2, 3, 4, 5)] == [False, True, False, True, False, False]
    for name in [*names(0, 2, 4, 5), "reward-000000", "reward-000001"]:
        six.load(name)
    assert listing(six.root / "policy-000003") == ["manifest.json", "manifest.sig", SAMPLES, "thinned", "tokenizer"]
    with pytest.raises(errors.NotFound, match=r"weights of policy-000003 were removed.*--keep-versions"):
        six.load("policy-000003")
    assert six.read("policy-000003", SAMPLES) == b"sample-3\n"
    assert [manifest.version for manifest in six.versions(POLICY)] == names(5, 4, 3, 2, 1, 0)
    assert six.describe("policy-000003")[0].sequence == 3


def test_what_was_broken_off_is_finished_and_never_taken_for_damage(
    six: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as broken_off:
        broken_off.setattr(Path, "unlink", broken)
        with pytest.raises(OSError, match="Input/output error"):
            six.thin(POLICY, keep=4)
    assert (six.root / "policy-000001" / "model.safetensors").exists()
    with pytest.raises(errors.NotFound, match="were removed"):
        six.load("policy-000001")
    assert six.thin(POLICY, keep=4) == names(1)
    assert not (six.root / "policy-000001" / "model.safetensors").exists()


def test_a_file_is_read_as_the_manifest_says_or_not_at_all(six: LocalStore) -> None:
    path = six.root / "policy-000004" / SAMPLES
    path.write_text("sample-9\n")
    with pytest.raises(errors.CorruptCheckpoint, match=r"policy-000004/samples\.txt was altered"):
        six.read("policy-000004", SAMPLES)
    path.unlink()
    with pytest.raises(errors.CorruptCheckpoint, match=r"policy-000004/samples\.txt cannot be read"):
        six.read("policy-000004", SAMPLES)
    with pytest.raises(errors.NotFound):
        six.read("policy-000077", SAMPLES)
    with pytest.raises(errors.CorruptCheckpoint, match="was altered"):
        six.read("policy-000003", "manifest.json")


def test_the_newest_is_found_without_reading_the_others(six: LocalStore) -> None:
    for name in names(0, 1, 2, 3):
        (six.root / name / "manifest.json").write_text("{")
    newest = six.latest(POLICY)
    assert newest is not None
    assert newest.version == "policy-000005"
    (six.root / "policy-000005" / "manifest.sig").unlink()
    newest = six.latest(POLICY)
    assert newest is not None
    assert newest.version == "policy-000004", "one that does not hold is passed over"
