"""Names and manifests of versions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel import errors
from thumbwheel.checkpoints import manifest as manifests
from thumbwheel.checkpoints.manifest import parse_version, version_name
from thumbwheel.v1.rollout_pb2 import CheckpointFile, CheckpointManifest, Lineage, ModelRole, OffsetRange, Probe


def test_names_of_versions() -> None:
    assert version_name(ModelRole.MODEL_ROLE_POLICY, 3) == "policy-000003"
    assert version_name(ModelRole.MODEL_ROLE_REWARD, 1_234_567) == "reward-1234567"


@given(st.sampled_from([ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD]), st.integers(0, 10**12))
def test_a_name_is_read_back(role: ModelRole.ValueType, sequence: int) -> None:
    assert parse_version(version_name(role, sequence)) == (role, sequence)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "policy", "policy-3", "policy-0000003", "critic-000003", "../policy-000003", "policy-000003/",
     "policy-000003\n", ".staging", "policy-00000३", "policy--00003"],
)  # fmt: skip
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        parse_version(name)
    assert caught.value.field == "version"


def test_a_role_without_versions_and_a_negative_sequence_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="role: "):
        version_name(ModelRole.MODEL_ROLE_UNSPECIFIED, 0)
    with pytest.raises(errors.InvalidArgument, match="sequence: is -1"):
        version_name(ModelRole.MODEL_ROLE_POLICY, -1)


def test_json_keeps_everything_and_is_the_same_each_time() -> None:
    manifest = CheckpointManifest(
        version="policy-000003",
        role=ModelRole.MODEL_ROLE_POLICY,
        sequence=3,
        parent="policy-000002",
        files=[CheckpointFile(path="model.safetensors", size=2**40, sha256="0" * 64)],
        lineage=Lineage(
            objective="dpo",
            settings={"beta": "0.1", "alpha": "0"},
            offsets=[OffsetRange(topic="thumbwheel.comparisons.v1", start=0, end=17)],
        ),
        metrics={"loss": 0.1, "accuracy": 1 / 3},
        probes=[Probe(prompt_token_ids=[1, 2], token_ids=[3], logprobs=[-0.1234567])],
    )
    data = manifests.to_json(manifest)
    assert json_format.Parse(data, CheckpointManifest()) == manifest
    again = CheckpointManifest()
    again.CopyFrom(manifest)
    again.lineage.settings.clear()
    again.lineage.settings.update({"alpha": "0", "beta": "0.1"})
    assert manifests.to_json(again) == data
    assert json.loads(data)["lineage"]["offsets"][0]["topic"] == "thumbwheel.comparisons.v1"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "data.pkl", "model.py", "weights", "a.npz"])
def test_files_that_could_carry_code_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "policy-000001"
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    with pytest.raises(
        errors.CorruptCheckpoint, match=rf"policy-000001/{name} is of a kind .* Weights are safetensors"
    ):
        manifests.describe_files(folder, {})


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("outside")
    folder = tmp_path / "policy-000001"
    (folder / "sub").mkdir(parents=True)
    link = folder / "sub/config.json"
    link.symlink_to(tmp_path / "secret.txt")
    with pytest.raises(
        errors.CorruptCheckpoint, match=r"policy-000001/sub/config\.json is neither a file nor a folder"
    ):
        manifests.list_files(folder)
    link.unlink()
    (folder / "out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(errors.CorruptCheckpoint, match="policy-000001/out is neither"):
        manifests.list_files(folder)
    (folder / "out").unlink()
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(errors.CorruptCheckpoint, match=r"policy-000001/pipe\.txt is neither"):
        manifests.list_files(folder)
