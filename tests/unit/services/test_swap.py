"""The order of a swap, its turns and time-outs, and the way back from a fault, with an engine that does as told."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import REGISTRY

from services import swap as swapping
from services.config import SwapSettings
from services.probes import Probes
from services.swap import Swapper, check_compatible
from services.turnstile import Turnstile
from tests.unit.checkpoints.test_delta import write_file
from tests.unit.checkpoints.test_held import WEIGHTS, Home
from thumbwheel import errors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.policy_pb2 import SwapOutcome
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, Probe

LIVE, REFUSED = SwapOutcome.SWAP_OUTCOME_LIVE, SwapOutcome.SWAP_OUTCOME_REFUSED
ROLLED_BACK, SUPERSEDED = SwapOutcome.SWAP_OUTCOME_ROLLED_BACK, SwapOutcome.SWAP_OUTCOME_SUPERSEDED

Versions = tuple[VerifiedVersion, ...]
PROBE = Probe(prompt_token_ids=[5, 6], token_ids=[7, 8], logprobs=[-1.0, -2.0])


class FakeLLM:
    """Remembers what it was asked; fails, hangs or computes something else when told to. Its workers replace weights in
    place, or, with `beside`, make them ready first.
    """

    def __init__(self, *, beside: bool = False) -> None:
        self.beside = beside
        self.staged = ""
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.hanging: set[str] = set()
        self.logprobs: dict[str, list[float]] = {}
        self.loaded = "policy-000000"
        self.release = asyncio.Event()
        self.reached = asyncio.Event()

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hanging:
            self.reached.set()
            await self.release.wait()
        if self.failing.get(name):
            self.failing[name] -= 1
            raise RuntimeError(f"no {name}")

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert clear_cache
        await self._called(f"pause {mode}")

    async def resume_generation(self) -> None:
        await self._called("resume")

    async def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        if method == "swap_weights":
            assert kwargs is not None
            self.loaded = Path(kwargs["weights_path"]).name
            await self._called(f"load {self.loaded}")
            return [None]
        if method == "stage":
            assert kwargs is not None
            self.staged = Path(kwargs["weights_path"]).name
            return [self.beside, self.beside]
        if method == "end_staging":
            self.staged = ""
            return [None]
        if method == "staged":
            await self._called(f"is {self.staged} ready")
            return [True, self.calls.count(f"is {self.staged} ready") > 1]
        if method == "exchange_weights":
            self.loaded, self.staged = self.staged, self.loaded
            await self._called(f"exchange for {self.loaded}")
            return [None]
        await self._called(f"{method} {self.loaded}")
        return [[], self.logprobs.get(self.loaded, [-1.0, -2.0])]

    async def update_weight_version(self, version: str) -> None:
        await self._called(f"label {version}")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """Four versions that fit each other, each with a probe."""
    home = Home(tmp_path_factory.mktemp("home"))
    loaded = [home.store.load(home.publish(number)) for number in range(4)]
    for version in loaded:
        version.manifest.probes.append(PROBE)
    return tuple(loaded)


async def begin(llm: FakeLLM, live: VerifiedVersion, **settings: Any) -> Swapper:
    """A swapper whose live version has been probed, as `Engine.start` leaves it."""
    of = SwapSettings(**settings)
    probes = Probes(llm, of, scores=False)
    await probes.check(live)
    llm.calls.clear()
    return Swapper(llm, live, of, Turnstile(), probes)


def seconds(step: str) -> float:
    """How often a step has been timed."""
    return REGISTRY.get_sample_value("thumbwheel_swap_seconds_count", {"step": step}) or 0.0


async def test_the_order_of_a_swap(versions: Versions) -> None:
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    steps = ("verify", "load", "wait", "pause", "exchange", "probe", "label", "resume", "paused")
    before = {step: seconds(step) for step in steps}
    swap = await swapper.swap(versions[1])
    assert llm.calls == [
        "pause keep",
        "load policy-000001",
        "probe_logprobs policy-000001",
        "label policy-000001",
        "resume",
    ]
    assert swap.outcome == LIVE
    assert (swapper.live, swapper.previous) == (versions[1], versions[0])
    assert {step: seconds(step) - before[step] for step in steps} == dict.fromkeys(steps, 1.0)


async def test_weights_are_made_ready_before_requests_rest(versions: Versions) -> None:
    llm = FakeLLM(beside=True)
    swapper = await begin(llm, versions[0])
    assert (await swapper.swap(versions[1])).outcome == LIVE
    assert llm.calls == [
        "is policy-000001 ready",  # not at the second worker
        "is policy-000001 ready",
        "pause keep",
        "exchange for policy-000001",
        "probe_logprobs policy-000001",
        "label policy-000001",
        "resume",
    ]
    assert llm.staged == ""


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_weights_that_cannot_be_made_ready_are_refused_and_nobody_rests(versions: Versions, how: str) -> None:
    llm = FakeLLM(beside=True)
    swapper = await begin(llm, versions[0], swap_load_seconds=0.05)
    if how == "fails":
        llm.failing["is policy-000001 ready"] = 1
    else:
        llm.hanging.add("is policy-000001 ready")
    swap = await swapper.swap(versions[1])
    assert swap.outcome == REFUSED
    assert ("no is policy-000001 ready" if how == "fails" else "TimeoutError") in swap.error
    assert llm.calls == ["is policy-000001 ready"]
    assert (swapper.live, llm.staged) == (versions[0], "")


async def test_weights_that_were_exchanged_are_exchanged_back(versions: Versions) -> None:
    """Without the disk: what was in use is still there."""
    llm = FakeLLM(beside=True)
    swapper = await begin(llm, versions[0])
    llm.logprobs["policy-000001"] = [-9.0, -9.0]
    assert (await swapper.swap(versions[1])).outcome == ROLLED_BACK
    assert llm.calls[-5:] == [
        "probe_logprobs policy-000001",
        "exchange for policy-000000",
        "probe_logprobs policy-000000",
        "label policy-000000",
        "resume",
    ]


async def test_where_it_is_not_known_whether_they_were_exchanged_the_disk_says(versions: Versions) -> None:
    llm = FakeLLM(beside=True)
    swapper = await begin(llm, versions[0])
    llm.failing["exchange for policy-000001"] = 1
    assert (await swapper.swap(versions[1])).outcome == ROLLED_BACK
    assert llm.calls[-5:] == ["exchange for policy-000001", *BACK]


async def test_a_swap_is_a_trace(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(swapping, "tracer", provider.get_tracer("test"))
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    llm.failing["load policy-000001"] = 1
    await swapper.swap(versions[1])
    spans = {span.name: span for span in exporter.get_finished_spans()}
    steps = ["swap.verify", "swap.load", "swap.wait", "swap.pause", "swap.exchange", "swap.restore", "swap.resume"]
    assert [span.name for span in exporter.get_finished_spans()] == [*steps, "swap"]
    whole = spans["swap"]
    assert dict(whole.attributes or {}) == {
        "from": "policy-000000",
        "to": "policy-000001",
        "mode": "keep",
        "outcome": "SWAP_OUTCOME_ROLLED_BACK",
    }
    assert [span.parent for name, span in spans.items() if name != "swap"] == [whole.context] * len(steps)
    assert {name for name, span in spans.items() if span.status.status_code == StatusCode.ERROR} == {"swap.exchange"}


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_requests_in_flight_are_treated_as_the_mode_says(versions: Versions, mode: Any) -> None:
    llm = FakeLLM()
    swapper = await begin(llm, versions[0], swap_mode=mode)
    await swapper.swap(versions[1])
    await swapper.swap(versions[2], mode="abort")
    assert [call for call in llm.calls if call.startswith("pause")] == [f"pause {mode}", "pause abort"]


BACK = ["load policy-000000", "probe_logprobs policy-000000", "label policy-000000", "resume"]


@pytest.mark.parametrize(
    ("fault", "done"),
    [
        ("load policy-000001", ["pause keep", "load policy-000001"]),
        ("probe_logprobs policy-000001", ["pause keep", "load policy-000001", "probe_logprobs policy-000001"]),
        (
            "label policy-000001",
            ["pause keep", "load policy-000001", "probe_logprobs policy-000001", "label policy-000001"],
        ),
    ],
)
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_fault_midway_puts_the_old_weights_back(
    versions: Versions, fault: str, done: list[str], how: str
) -> None:
    llm = FakeLLM()
    short = {"swap_load_seconds": 0.05, "swap_probe_seconds": 0.05, "swap_resume_seconds": 0.05}
    swapper = await begin(llm, versions[0], **(short if how == "hangs" else {}))
    if how == "hangs":
        llm.hanging.add(fault)
    else:
        llm.failing[fault] = 1
    swap = await swapper.swap(versions[1])
    assert llm.calls == done + BACK
    assert swap.outcome == ROLLED_BACK
    assert ("TimeoutError" if how == "hangs" else f"no {fault}") in swap.error
    assert swapper.live is versions[0]
    assert swapper.previous is None


@pytest.mark.parametrize("logprobs", [[-1.0, -2.6], [-1.0], [-1.0, math.nan], [math.inf, -2.0], []])
async def test_weights_that_compute_something_else_are_put_back(versions: Versions, logprobs: list[float]) -> None:
    llm = FakeLLM()
    llm.logprobs["policy-000001"] = logprobs
    swapper = await begin(llm, versions[0], probe_logprob_tolerance=0.5)
    swap = await swapper.swap(versions[1])
    assert llm.calls[-len(BACK) :] == BACK
    assert swap.outcome == ROLLED_BACK
    assert "does not compute what its manifest says" in swap.error
    assert swapper.live is versions[0]


async def test_the_tolerance_lets_noise_through(versions: Versions) -> None:
    llm = FakeLLM()
    llm.logprobs["policy-000001"] = [-1.4, -1.6]
    swapper = await begin(llm, versions[0], probe_logprob_tolerance=0.5)
    assert (await swapper.swap(versions[1])).outcome == LIVE


async def test_no_way_back_is_an_error_that_ends_the_process(versions: Versions) -> None:
    llm = FakeLLM()
    llm.failing = {"load policy-000001": 1, "load policy-000000": 1}
    swapper = await begin(llm, versions[0])
    with pytest.raises(errors.Internal, match="so did the way back to policy-000000"):
        await swapper.swap(versions[1])
    assert "resume" not in llm.calls
    assert swapper.broken is not None


async def test_weights_that_came_back_otherwise_are_no_way_back(versions: Versions) -> None:
    """What was put back must compute, to the last bit, what it computed when it was live."""
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    llm.failing["load policy-000001"] = 1
    llm.logprobs["policy-000000"] = [-1.0, -2.001]
    with pytest.raises(errors.Internal, match="computes something else now"):
        await swapper.swap(versions[1])
    assert "resume" not in llm.calls


async def test_an_engine_that_does_not_pause_goes_on_with_the_old_weights(versions: Versions) -> None:
    llm = FakeLLM()
    llm.hanging.add("pause wait")
    swapper = await begin(llm, versions[0], swap_mode="wait", swap_wait_seconds=0.05)
    with pytest.raises(errors.Unavailable, match="did not pause"):
        await swapper.swap(versions[1])
    assert llm.calls == ["pause wait", "resume"]
    assert [swap.outcome for swap in swapper.swaps] == [LIVE, REFUSED]
    assert swapper.live is versions[0]


async def test_of_those_that_wait_only_the_newest_is_done(versions: Versions) -> None:
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    llm.hanging.add("load policy-000001")
    first = asyncio.create_task(swapper.swap(versions[1]))
    await llm.reached.wait()
    rest = [asyncio.create_task(swapper.swap(version)) for version in (versions[2], versions[1], versions[3])]
    await asyncio.sleep(0)  # they are asking now
    llm.release.set()
    outcomes = [(await task).outcome for task in (first, *rest)]
    assert outcomes == [LIVE, SUPERSEDED, SUPERSEDED, LIVE]
    assert swapper.live is versions[3]
    assert [call for call in llm.calls if call.startswith("load")] == ["load policy-000001", "load policy-000003"]


async def test_a_caller_that_goes_away_leaves_no_swap_half_done(versions: Versions) -> None:
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    llm.hanging.add("load policy-000001")
    caller = asyncio.create_task(swapper.swap(versions[1]))
    await llm.reached.wait()
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    llm.release.set()
    assert (await swapper.swap(versions[2])).outcome == LIVE
    assert [swap.version for swap in swapper.swaps] == ["policy-000000", "policy-000001", "policy-000002"]
    assert llm.calls.count("resume") == 2


async def test_rollback_goes_back_once(versions: Versions) -> None:
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    with pytest.raises(errors.FailedPrecondition, match="no version before policy-000000"):
        await swapper.rollback()
    await swapper.swap(versions[1])
    assert (await swapper.rollback()).outcome == LIVE
    assert (swapper.live, swapper.previous) == (versions[0], None)


async def test_calls_that_need_one_version_hold_a_swap_off_for_so_long(versions: Versions) -> None:
    llm = FakeLLM()
    settings = SwapSettings(swap_wait_seconds=0.05)
    turnstile = Turnstile()
    swapper = Swapper(llm, versions[0], settings, turnstile, Probes(llm, settings, scores=False))
    async with turnstile.call():
        with pytest.raises(errors.Unavailable, match="did not end in time"):
            await swapper.swap(versions[1])
    assert llm.calls == []
    assert (await swapper.swap(versions[1])).outcome == LIVE


@pytest.mark.parametrize(
    ("name", "dtype", "weights", "fault"),
    [
        ("w", "BF16", np.zeros(99_999, np.uint16), r"w: \('BF16', \(99999,\)\) instead of \('BF16', \(100000,\)\)"),
        ("w", "F16", np.zeros(100_000, np.uint16), r"w: \('F16', \(100000,\)\) instead"),
        ("v", "BF16", np.zeros(100_000, np.uint16), "2 tensors differ, such as v"),
        ("w", "BF16", np.full(100_000, 0x7FC0, np.uint16), "100,000 weights of w are infinite or not numbers"),
    ],
    ids=["shape", "dtype", "name", "not a number"],
)
async def test_weights_that_cannot_be_served_are_refused_before_serving_is_touched(
    versions: Versions, tmp_path: Path, name: str, dtype: str, weights: Any, fault: str
) -> None:
    write_file(tmp_path / WEIGHTS, {name: (dtype, weights.tobytes())})
    llm = FakeLLM()
    swapper = await begin(llm, versions[0])
    swap = await swapper.swap(VerifiedVersion(tmp_path, versions[1].manifest, ""))
    assert swap.outcome == REFUSED
    assert re.search(fault, swap.error)
    assert llm.calls == []
    assert swapper.live is versions[0]


def test_another_tokenizer_is_refused(versions: Versions) -> None:
    old, new = versions[:2]
    changed = CheckpointManifest()
    changed.CopyFrom(new.manifest)
    next(file for file in changed.files if file.path == "tokenizer.json").sha256 = "0" * 64
    check_compatible(old, new)
    with pytest.raises(errors.CorruptCheckpoint, match="another tokenizer"):
        check_compatible(old, VerifiedVersion(new.path, changed, ""))


async def test_scores_are_probed_with_the_whole_text(versions: Versions) -> None:
    llm = FakeLLM()
    asked: list[Any] = []

    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[list[float]]:
        asked.append((method, args))
        return [[0.75]]

    llm.collective_rpc = collective_rpc  # type: ignore[assignment,method-assign]  # answers with a score
    manifest = CheckpointManifest(version="reward-000001", role=ModelRole.MODEL_ROLE_REWARD, sequence=1)
    manifest.probes.append(Probe(prompt_token_ids=[5, 6], token_ids=[7, 2], score=0.5))
    await Probes(llm, SwapSettings(probe_score_tolerance=0.3), scores=True).check(
        VerifiedVersion(versions[0].path, manifest, "")
    )
    assert asked == [("probe_score", ([5, 6, 7, 2],))]
    with pytest.raises(errors.CorruptCheckpoint, match=r"off by 0\.250, more than 0\.2\."):
        await Probes(llm, SwapSettings(probe_score_tolerance=0.2), scores=True).check(
            VerifiedVersion(versions[0].path, manifest, "")
        )
