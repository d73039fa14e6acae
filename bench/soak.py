"""`make soak MINUTES=30`: a whole stack under steady load, with a new version now and then, for as long as asked.

Every five seconds: memory (proportional set size) and open files of each part with its children, what each folder of
the home takes, and how long calls took. At the end, slopes after the first third, in which caches fill: by least
squares over the rest, an hour's worth; latency of the last third over that of the middle one. What the collector keeps
is bounded by a retention of five minutes, so its part of the disk must level off.

Writes a plot, and a line of JSON. The model is tiny and random unless `--model` names another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import harness
from tests.support import free_base_port, make_tiny_llama
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.stack import Stack, StackSettings
from thumbwheel.v1.policy_pb2 import SamplingParams

ENVIRONMENT = {
    "THUMBWHEEL_LEARN_FROM_CUT": "true",  # every answer is cut here
    "THUMBWHEEL_MAX_MODEL_LEN": "512",
    "THUMBWHEEL_ROUND_SIZE": "64",
    "THUMBWHEEL_POLICY_LEARNING_RATE": "1e-6",
    "THUMBWHEEL_REWARD_LEARNING_RATE": "1e-6",
}
TENANTS = "[defaults]\nretention_days = 0.0035\n"
SHORT = SamplingParams(max_tokens=24, ignore_eos=True)
USERS = 3
PAUSE_SECONDS = 1.0
SAMPLE_SECONDS = 5.0
TICKS = 1000.0  # milliseconds


@dataclass
class Sample:
    """A moment: seconds since the start, bytes and files by part, bytes by folder, and milliseconds of recent calls."""

    at: float
    memory: dict[str, int]
    files: dict[str, int]
    disk: dict[str, int]
    calls: list[float]


@dataclass
class Soak:
    """What is known so far."""

    samples: list[Sample] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    calls: int = 0
    failed: list[str] = field(default_factory=list)
    version: str = ""
    swaps: int = 0


async def user(client: AsyncClient, soak: Soak, number: int) -> None:
    """Asks, compares, scores and votes for ever, with a pause between."""
    for turn in range(sys.maxsize):
        try:
            began = time.perf_counter()
            asked = f"Question {turn} of {number}"
            who = f"u{number}-{turn}"
            a, b = (await client.candidates(asked, sampling=SHORT, user_id=who)).candidates
            soak.recent.append(TICKS * (time.perf_counter() - began))
            await client.compare(a, b, "a" if turn % 2 else "b", user_id=who)
            await client.score(asked, a.text, b.text)
            soak.calls += 3
        except errors.ThumbwheelError as error:
            soak.failed.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(PAUSE_SECONDS)


async def watch(stack: Stack, client: AsyncClient, soak: Soak, seconds: float) -> None:
    """Samples until the time is over."""
    began = time.monotonic()
    while (at := time.monotonic() - began) < seconds:
        harness.progress(
            f"{at / 60:.0f} of {seconds / 60:.0f} minutes, {soak.calls} calls, {soak.version}", at / seconds
        )
        soak.samples.append(await asyncio.to_thread(_sample, stack, soak, at))
        with contextlib.suppress(errors.ThumbwheelError):
            live = await client.policy()
            soak.version, soak.swaps = live.version, max(soak.swaps, len(live.swaps) - 1)
        await asyncio.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - began - at)))
    harness.progress("", 1.0)


def _sample(stack: Stack, soak: Soak, at: float) -> Sample:
    memory: dict[str, int] = defaultdict(int)
    files: dict[str, int] = defaultdict(int)
    for name, part in stack.parts.items():
        for process in _tree(part.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory[name] += process.memory_full_info().pss
                files[name] += process.num_fds()
    calls, soak.recent = soak.recent, []
    return Sample(at, dict(memory), dict(files), _disk(stack.settings.home), calls)


def _tree(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        yield root
        yield from root.children(recursive=True)


def _disk(home: Path) -> dict[str, int]:
    """Bytes of each folder of the home, and of the files right in it."""
    found: dict[str, int] = defaultdict(int)
    for path in home.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                relative = path.relative_to(home)
                name = relative.parts[0] if len(relative.parts) > 1 else relative.name.partition(".")[0]
                found[name] += path.stat().st_blocks * 512
    return dict(found)


def slope(times: list[float], values: list[float]) -> float:
    """The least squares' slope, an hour's worth."""
    return float(np.polyfit(np.asarray(times) / 3600.0, values, 1)[0]) if len(times) > 2 else 0.0


def summary(soak: Soak, minutes: float) -> dict[str, Any]:
    """The closing line."""
    third = len(soak.samples) // 3
    settled, middle, last = soak.samples[third:], soak.samples[third : 2 * third], soak.samples[2 * third :]
    times = [sample.at for sample in settled]

    def slopes(what: str, unit: float) -> dict[str, float]:
        names = sorted({name for sample in settled for name in getattr(sample, what)})
        series = {name: [getattr(sample, what).get(name, 0) / unit for sample in settled] for name in names}
        return {name: round(slope(times, values), 1) for name, values in series.items()}

    before = [call for sample in middle for call in sample.calls]
    after = [call for sample in last for call in sample.calls]
    return {
        "soak": round(minutes, 1),
        "calls": soak.calls,
        "failed": len(soak.failed),
        "version": soak.version,
        "swaps": soak.swaps,
        "memory_mib_per_hour": slopes("memory", 2**20),
        "memory_mib": {name: round(value / 2**20) for name, value in soak.samples[-1].memory.items()},
        "files_per_hour": slopes("files", 1.0),
        "disk_mib_per_hour": slopes("disk", 2**20),
        "latency_drift": {
            "p50": round(statistics.median(after) / statistics.median(before), 3),
            "p95": round(harness.percentile(after, 0.95) / harness.percentile(before, 0.95), 3),
        },
    }


def plot(soak: Soak, path: Path) -> None:
    """Memory, files, disk and latency over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    minutes = [sample.at / 60 for sample in soak.samples]
    for axes, (what, unit, title) in zip(
        panels.flat,
        (("memory", 2**20, "memory, MiB"), ("files", 1, "open files"), ("disk", 2**20, "disk, MiB")),
        strict=False,
    ):
        for name in sorted({name for sample in soak.samples for name in getattr(sample, what)}):
            axes.plot(minutes, [getattr(sample, what).get(name, 0) / unit for sample in soak.samples], label=name)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    axes = panels.flat[3]
    for share in (0.5, 0.95):
        asked = [(sample.at / 60, harness.percentile(sample.calls, share)) for sample in soak.samples if sample.calls]
        axes.plot(*zip(*asked, strict=True), label=f"p{100 * share:.0f}")
    axes.set_title("two candidates of 24 tokens, ms")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    for axes in panels.flat:
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


async def run(minutes: float, model: str) -> Soak:
    """The stack, its users, and who watches."""
    soak = Soak()
    with tempfile.TemporaryDirectory(prefix="thumbwheel-soak-") as name:
        folder = Path(name)
        made = model or str(make_tiny_llama(folder / "tiny", seed=0))
        settings = StackSettings(home=folder / "home", base_port=free_base_port(), model=made)
        settings.home.mkdir()
        (settings.home / "tenants.toml").write_text(TENANTS)
        at = settings.addresses
        async with (
            Stack.running(settings, environment=ENVIRONMENT) as stack,
            AsyncClient(policy=at.policy, reward=at.reward, collector=at.collector, timeout=60.0) as client,
        ):
            users = [asyncio.create_task(user(client, soak, number)) for number in range(USERS)]
            try:
                await watch(stack, client, soak, 60.0 * minutes)
            finally:
                for one in users:
                    one.cancel()
                await asyncio.wait(users)
    return soak


def main() -> int:
    """The command; status 1 where a call failed or nothing new went live."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="", help="a folder or a Hugging Face id; a tiny random one where left out")
    parser.add_argument("--plot", type=Path, default=Path("bench-out/soak.png"))
    given = parser.parse_args()
    soak = asyncio.run(run(given.minutes, given.model))
    plot(soak, given.plot)
    for failure in soak.failed[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"plot: {given.plot}")
    print(json.dumps(summary(soak, given.minutes)))
    return 1 if soak.failed or not soak.swaps else 0


if __name__ == "__main__":
    sys.exit(main())
