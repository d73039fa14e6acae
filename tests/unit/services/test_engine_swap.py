"""The order of a swap, and the way back from a fault, with an engine that does as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.engine import Engine, check_compatible
from tests.support import Deployment, make_tiny_llama
from thumbwheel import errors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.policy_pb2 import SwapOutcome
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

POLICY = ModelRole.MODEL_ROLE_POLICY


class FakeLLM:
    """Remembers what it was asked; fails when told to."""

    def __init__(self, failing_reloads: int = 0) -> None:
        self.calls: list[str] = []
        self.failing_reloads = failing_reloads

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode} clear={clear_cache}")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method} {Path(kwargs['weights_path']).name}")
        if self.failing_reloads:
            self.failing_reloads -= 1
            raise RuntimeError("out of memory")

    async def update_weight_version(self, version: str) -> None:
        self.calls.append(f"label {version}")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[VerifiedVersion, VerifiedVersion]:
    """Two versions that fit each other."""
    deployment = Deployment(tmp_path_factory.mktemp("home"))
    old, new = (deployment.publish(POLICY, i, seed=i) for i in range(2))
    return deployment.store.load(old.version), deployment.store.load(new.version)


async def test_the_order_of_a_swap(versions: tuple[VerifiedVersion, VerifiedVersion]) -> None:
    llm = FakeLLM()
    engine = Engine(llm, versions[0], 5.0)
    swap = await engine.swap(versions[1])
    assert llm.calls == [
        "pause keep clear=True",
        "swap_weights policy-000001",
        "label policy-000001",
        "resume",
    ]
    assert swap.outcome == SwapOutcome.SWAP_OUTCOME_LIVE
    assert engine.version == "policy-000001"


async def test_a_fault_midway_puts_the_old_weights_back(versions: tuple[VerifiedVersion, VerifiedVersion]) -> None:
    llm = FakeLLM(failing_reloads=1)
    engine = Engine(llm, versions[0], 5.0)
    swap = await engine.swap(versions[1])
    assert llm.calls == [
        "pause keep clear=True",
        "swap_weights policy-000001",
        "pause keep clear=True",
        "swap_weights policy-000000",
        "label policy-000000",
        "resume",
    ]
    assert swap.outcome == SwapOutcome.SWAP_OUTCOME_ROLLED_BACK
    assert "out of memory" in swap.error
    assert engine.version == "policy-000000"


async def test_no_way_back_is_an_error_that_ends_the_process(
    versions: tuple[VerifiedVersion, VerifiedVersion],
) -> None:
    llm = FakeLLM(failing_reloads=2)
    engine = Engine(llm, versions[0], 5.0)
    with pytest.raises(errors.Internal, match="so did the way back to policy-000000"):
        await engine.swap(versions[1])
    assert "resume" not in llm.calls


async def test_a_version_of_another_shape_is_refused_before_serving_is_touched(
    versions: tuple[VerifiedVersion, VerifiedVersion], tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "reward", seed=3, reward=True)
    manifest = CheckpointManifest(version="policy-000009", role=POLICY, sequence=9)
    llm = FakeLLM()
    engine = Engine(llm, versions[0], 5.0)
    swap = await engine.swap(VerifiedVersion(folder, manifest, ""))
    assert swap.outcome == SwapOutcome.SWAP_OUTCOME_REFUSED
    assert "score.weight" in swap.error
    assert llm.calls == []
    assert engine.version == "policy-000000"


def test_another_tokenizer_is_refused(versions: tuple[VerifiedVersion, VerifiedVersion]) -> None:
    old, new = versions
    changed = CheckpointManifest()
    changed.CopyFrom(new.manifest)
    next(file for file in changed.files if file.path == "tokenizer.json").sha256 = "0" * 64
    check_compatible(old, new)
    with pytest.raises(errors.CorruptCheckpoint, match="another tokenizer"):
        check_compatible(old, VerifiedVersion(new.path, changed, ""))
