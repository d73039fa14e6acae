"""`make bench-swap`: what a swap costs those who are being served, on the default model.

    stall_vs_reload    longest gap of a stream around a swap, less its usual gap ÷ bare `reload_weights` of the weights
    restart_vs_stall   ending and starting the engine ÷ that stall
    swapping_vs_not    tokens a second with a swap every ten seconds, fetched from the store ÷ with none
    delta_bytes        bytes of a version's delta ÷ bytes of its weights

The versions are those of a real run: DPO by the trainer's own learner, at its default learning rate. Each round
starts the engine, and measures all of it in turn, so that what else the machine does falls on both sides of a ratio.
Ratios are of each round; shown are their medians and their spread.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import harness
from bench.delta import learnt

WEIGHTS = "model.safetensors"
VERSIONS = 4
"""The base and those that are learnt from it, one from the other."""
CONCURRENCY = 8
STREAM_TOKENS = 1500
"""Of streams in which a stall is looked for: none ends by itself at a moment that counts."""
ANSWERS = 32, 160
"""Tokens of a response, where tokens a second are measured."""
SETTLED = 24
"""Tokens of each stream before a swap, and after it, from which its usual gap is taken."""


@dataclass
class Round:
    """What one round measured, in seconds and tokens a second."""

    restart: float = 0.0
    stalls: list[float] = field(default_factory=list)
    reloads: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    swapping: float = 0.0
    steady: float = 0.0


def publish(home: Path, model: Path, folders: Sequence[Path]) -> Any:
    """A store with the versions that were learnt, each with its delta and its probe, as the trainer publishes them."""
    from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
    from thumbwheel.checkpoints import delta
    from thumbwheel.checkpoints.store import LocalStore, version_name
    from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, Probe
    from trainer import models
    from trainer import publish as publishing

    create_keys(home / "keys")
    signer = ManifestSigner.load(home / "keys")
    store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))
    publishing.ensure_base(model, store, signer)
    base = store.load(version_name(ModelRole.MODEL_ROLE_POLICY, 0))
    probe = base.manifest.probes[0]
    prompt, continuation = list(probe.prompt_token_ids), list(probe.token_ids)
    for sequence, version in enumerate(folders[1:], 1):
        parent = version_name(ModelRole.MODEL_ROLE_POLICY, sequence - 1)
        publishing.copy_tokenizer(base, version)
        weights = version / WEIGHTS
        delta.write(store.root / parent / WEIGHTS, weights, version / (WEIGHTS + delta.SUFFIX))
        found = models.continuation_logprobs(models.load_causal(version).eval(), prompt, continuation)
        manifest = CheckpointManifest(
            version=version_name(ModelRole.MODEL_ROLE_POLICY, sequence),
            role=ModelRole.MODEL_ROLE_POLICY,
            sequence=sequence,
            parent=parent,
            base_model=base.manifest.base_model,
            probes=[Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=found)],
        )
        store.publish(manifest, partial(_copy, version), signer)
    return store


def delta_sizes(store: Any, count: int) -> harness.Ratio:
    """Bytes of each delta, and of the weights that it makes; each is applied, and must come to the very same bytes."""
    from thumbwheel import files
    from thumbwheel.checkpoints import delta

    ratio = harness.Ratio("delta_bytes", "MB", harness.Target(most=0.05))
    for sequence in range(1, count):
        parent, folder = (store.root / f"policy-{number:06d}" for number in (sequence - 1, sequence))
        whole, packed = folder / WEIGHTS, folder / (WEIGHTS + delta.SUFFIX)
        with tempfile.TemporaryDirectory() as name:
            made = Path(name, WEIGHTS)
            delta.apply(parent / WEIGHTS, packed, made, sha256=files.sha256(whole))
            assert made.read_bytes() == whole.read_bytes()
        ratio.add(packed.stat().st_size / 1e6, whole.stat().st_size / 1e6)
    return ratio


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


@asynccontextmanager
async def streams(
    llm: Any, label: str, ends: list[list[float]], *, least: int = STREAM_TOKENS, most: int = STREAM_TOKENS
) -> AsyncIterator[None]:
    """Streams that go on inside, one response of `least` to `most` tokens after the other. `ends` gets the time of each
    token of each.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    async def one(number: int) -> None:
        times: list[float] = []
        ends.append(times)
        dice = random.Random(number)
        for turn in itertools.count():
            params = vllm.SamplingParams(
                temperature=1.0,
                max_tokens=dice.randint(least, most),
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = vllm.TokensPrompt(prompt_token_ids=[100 + number, *range(200, 230)])
            async for output in llm.generate(prompt, params, f"{label}-{number}-{turn}"):
                times.extend([time.perf_counter()] * len(output.outputs[0].token_ids))

    tasks = [asyncio.create_task(one(number)) for number in range(CONCURRENCY)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def until_tokens(ends: Sequence[Sequence[float]], count: int, since: float = 0.0) -> None:
    """Waits until each stream has so many tokens after `since`."""
    async with asyncio.timeout(120):
        while len(ends) < CONCURRENCY or any(sum(t > since for t in times) < count for times in ends):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def measure_stall(engine: Any, target: Any, label: str, into: Round) -> None:
    """The longest gap of each stream around one swap, less its usual gap; the median over the streams."""
    ends: list[list[float]] = []
    async with streams(engine.llm, label, ends):
        await until_tokens(ends, SETTLED)
        asked = time.perf_counter()
        swap = await engine.swap(target)
        assert swap.outcome == 1, swap.error
        await until_tokens(ends, SETTLED, time.perf_counter())
        stalls, usual = [], []
        for times in ends:
            gaps = [(b - a, b) for a, b in itertools.pairwise(times)]
            common = statistics.median(gap for gap, _ in gaps)
            usual.append(common)
            stalls.append(max(gap for gap, end in gaps if end > asked) - common)
    into.stalls.append(statistics.median(stalls))
    into.usual.append(statistics.median(usual))
    into.pauses.append(swap.pause_seconds)


async def measure_reload(engine: Any, into: Round) -> None:
    """vLLM's own `reload_weights`, of the weights that are live, with nothing else to do."""
    start = time.perf_counter()
    await engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(engine.live.path)})
    into.reloads.append(time.perf_counter() - start)


async def throughput(engine: Any, held: Any, names: Sequence[str], seconds: float, every: float, label: str) -> float:
    """Tokens a second; with a version brought from the store and swapped in `every` so many seconds, where not 0."""
    ends: list[list[float]] = []
    async with streams(engine.llm, label, ends, least=ANSWERS[0], most=ANSWERS[1]):
        await until_tokens(ends, SETTLED)
        start, number = time.perf_counter(), 0
        while (left := start + seconds - time.perf_counter()) > 0:
            if not every:
                await asyncio.sleep(left)
                continue
            target = await asyncio.to_thread(held.fetch, names[number % len(names)], timeout=60.0)
            assert (await engine.swap(target)).outcome == 1
            held.keep_only({engine.version, engine.previous.manifest.version})
            number += 1
            await asyncio.sleep(max(0.0, min(left, start + number * every - time.perf_counter())))
        end = time.perf_counter()
    return sum(start < t <= end for times in ends for t in times) / (end - start)


async def one_round(home: Path, store: Any, number: int, seconds: float) -> Round:
    """All measurements once. The order of the two throughputs alternates."""
    from services.engine import Engine
    from services.policy.config import PolicySettings
    from thumbwheel.checkpoints.held import HeldVersions

    found = Round()
    names = [f"policy-{sequence:06d}" for sequence in range(VERSIONS)]
    held = HeldVersions(home / "held", store)
    settings = PolicySettings(home=home)
    first = held.fetch(names[0], timeout=60.0)
    start = time.perf_counter()
    engine = await Engine.start(first, settings, pooling=False)
    found.restart = time.perf_counter() - start
    try:
        other = held.fetch(names[1], timeout=60.0)
        for turn in range(4):
            await measure_stall(engine, (other, first)[turn % 2], f"stall-{turn}", found)
            await measure_reload(engine, found)
        for swapping in (True, False) if number % 2 else (False, True):
            rate = await throughput(engine, held, names[1:], seconds, 10.0 if swapping else 0.0, f"rate-{swapping}")
            if swapping:
                found.swapping = rate
            else:
                found.steady = rate
    finally:
        start = time.perf_counter()
        await engine.close()
        found.restart += time.perf_counter() - start
        held.close()
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each measurement of tokens a second")
    parser.add_argument("--pairs", type=int, default=48, help="pairs that the versions are learnt from, in all")
    parser.add_argument("--model", default=None, help="a folder or a Hugging Face id; the default model where left out")
    given = parser.parse_args()
    from trainer import base, runtime

    runtime.before_imports()
    runtime.quiet_transformers()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        folders = learnt(home / "learnt", given.model, pairs=given.pairs, rounds=VERSIONS - 1)
        store = publish(home, base.fetch(given.model), folders)
        deltas = delta_sizes(store, VERSIONS)
        rounds = []
        for number in range(given.rounds):
            rounds.append(asyncio.run(one_round(home, store, number, given.seconds)))
            last = rounds[-1]
            print(
                f"round {number + 1}: stall {statistics.median(last.stalls):.3f} s (usual gap "
                f"{statistics.median(last.usual):.3f} s, paused {statistics.median(last.pauses):.3f} s), reload "
                f"{statistics.median(last.reloads):.3f} s, restart {last.restart:.1f} s, {last.swapping:.1f} tokens/s "
                f"swapping, {last.steady:.1f} not",
                flush=True,
            )
    stall = harness.Ratio("stall_vs_reload", "ms", harness.Target(most=1.2))
    restart = harness.Ratio("restart_vs_stall", "ms", harness.Target(least=50))
    swapping = harness.Ratio("swapping_vs_not", "tokens/s", harness.Target(least=0.95))
    for one in rounds:
        lost = 1000 * statistics.median(one.stalls)
        stall.add(lost, 1000 * statistics.median(one.reloads))
        restart.add(1000 * one.restart, lost)
        swapping.add(one.swapping, one.steady)
    harness.report("swap", [stall, restart, swapping, deltas], len(rounds))


if __name__ == "__main__":
    main()
