"""`make bench-freshness`: from a click to the first token of weights that learnt it, on one machine.

    click_to_live_vs_bare       median of that time ÷ (a bare PyTorch training step + vLLM's bare `reload_weights`)
    click_to_live_p95_seconds   its 95th percentile

The whole deployment runs, on the default model: users compare short answers, eight comparisons make a round of one DPO
step, the version is published, verified and swapped in, and a request is sent as soon as the policy says that it is
live. Each round starts everything, measures so many rounds of clicks, stops it, and then does the bare work on the same
pairs: the reference's pass, a step with fp32 master weights, and a reload in an engine with nothing else to do. The
first of each is discarded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import harness

PAIRS = 8
TOKENS = 32
WAIT_SECONDS = 300.0


async def ours(
    home: Path, model: str, base_port: int, steps: int, seed: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds from every click to the first token that learnt it, without those of the first step; and its pairs."""
    from thumbwheel.client import AsyncClient
    from thumbwheel.stack import Stack, StackSettings

    settings = StackSettings(home=home, base_port=base_port, model=model)
    environment = {
        "THUMBWHEEL_TASKS": "policy",
        "THUMBWHEEL_ROUND_SIZE": str(PAIRS),
        "THUMBWHEEL_BATCH_SIZE": str(PAIRS),
        "THUMBWHEEL_LEARN_FROM_CUT": "true",  # the pairs are to be short
    }
    seconds: list[float] = []
    pairs: list[dict[str, Any]] = []
    async with (
        Stack.running(settings, environment=environment, progress=lambda what: harness.progress(what, 0.0)) as stack,
        AsyncClient(policy=stack.addresses.policy, collector=stack.addresses.collector, timeout=120) as client,
    ):
        for step in range(steps + 1):
            clicked, shown = await _clicks(client, seed * 1000 + step)
            live = await _first_token(client, step + 1)
            if step:
                seconds += [live - at for at in clicked]
                pairs = shown
    return seconds, pairs


async def _clicks(client: Any, number: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Eight users compare two answers each, all at once. When each clicked, and what they compared."""
    from thumbwheel.demo.prompts import train_prompts
    from thumbwheel.v1.policy_pb2 import SamplingParams

    prompts = train_prompts()
    sampling = SamplingParams(temperature=1.0, max_tokens=TOKENS)
    start = number * PAIRS % (len(prompts) - PAIRS)
    asked = [(f"user-{number}-{index}", prompts[start + index]) for index in range(PAIRS)]
    shown = await asyncio.gather(*(client.candidates(p, n=2, sampling=sampling, user_id=user) for user, p in asked))
    await asyncio.sleep(2.0)  # their generations reach the collector: what is timed begins with a click

    async def click(user: str, candidates: Any) -> float:
        a, b = candidates.candidates
        began = time.perf_counter()
        await client.compare(a, b, "a" if len(a.text) <= len(b.text) else "b", user_id=user)
        return began

    clicked = await asyncio.gather(*(click(user, one) for (user, _), one in zip(asked, shown, strict=True)))
    compared = [
        {"prompt": prompt, "chosen": list(one.candidates[0].token_ids), "rejected": list(one.candidates[1].token_ids)}
        for (_, prompt), one in zip(asked, shown, strict=True)
    ]
    return list(clicked), compared


async def _first_token(client: Any, sequence: int) -> float:
    """When the first token of this version, or a later one, arrives."""
    from thumbwheel.v1.policy_pb2 import SamplingParams

    async with asyncio.timeout(WAIT_SECONDS):
        while int((await client.policy()).version.rpartition("-")[2]) < sequence:  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.05)  # only asking can tell, and asking more often would slow down what is measured
        async for _ in client.stream("Hello", sampling=SamplingParams(max_tokens=1)):
            return time.perf_counter()
    raise AssertionError("a stream without a token")


def bare(pairs: Sequence[dict[str, Any]], model: str, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of bare steps on these pairs, and of bare reloads, each in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.json")
        path.write_text(json.dumps(list(pairs)))
        found = []
        for what in ("step", "reload"):
            command = [sys.executable, "-m", "bench.freshness_bare", what, str(path), str(repeats), model]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=WAIT_SECONDS)
            told = [line for line in done.stdout.splitlines() if line.startswith("@")]  # engines say things, too
            found.append(json.loads(told[-1][1:]))
    return found[0], found[1]


def main() -> None:
    """Measures, and reports."""
    parser = argparse.ArgumentParser(prog="make bench-freshness", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of eight pairs in a round, after the first")
    parser.add_argument("--base-port", type=int, default=23500)
    parser.add_argument("--model", default="", help="a Hugging Face id or a folder; left out: the default model")
    options = parser.parse_args()
    ratio = harness.Ratio("click_to_live_vs_bare", "s", harness.Target(most=1.3))
    clicks: list[float] = []
    for number in range(options.rounds):
        harness.progress(f"round {number + 1} of {options.rounds}", number / options.rounds)
        with tempfile.TemporaryDirectory() as home:
            seconds, pairs = asyncio.run(ours(Path(home), options.model, options.base_port, options.steps, number))
        steps, reloads = bare(pairs, options.model, options.steps)
        clicks += seconds
        ratio.add(statistics.median(seconds), statistics.median(steps) + statistics.median(reloads))
        print(
            f"round {number + 1}: click to live {statistics.median(seconds):.2f} s, bare step "
            f"{statistics.median(steps):.2f} s, bare reload {statistics.median(reloads):.2f} s",
            flush=True,
        )
    harness.progress("", 1.0)
    p95 = harness.percentile(clicks, 0.95)
    print(
        f"click to live: p50 {statistics.median(clicks):.2f} s, p95 {p95:.2f} s (target ≤ 90), of {len(clicks)} clicks"
    )
    harness.report("freshness", [ratio], options.rounds, {"click_to_live_p95_seconds": round(p95, 2)})


if __name__ == "__main__":
    main()
