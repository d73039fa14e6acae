"""What benchmarks share: rounds that interleave a thing with its peer, ratios with their spread, and the report.

Two runs of one program differ by more than most changes do. So a thing and its peer are measured in turns, in the same
round; the ratio is taken within the round; and what is reported is the median over rounds, with a bootstrap interval of
95 % for that median (percentile method, 2,000 resamples, seeded).

The last line that a benchmark prints is one JSON object:

    {"bench": NAME, "ratios": {KEY: MEDIAN, ...}, "spread": {KEY: [LOW, HIGH], ...}, "runs": ROUNDS}
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_RESAMPLES = 2_000
_SEED = 20_240_501


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio should be: at least `least`, or at most `most`."""

    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether it is so."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        """As it stands in a table."""
        return "" if self.least is self.most is None else f"≥ {self.least}" if self.most is None else f"≤ {self.most}"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio by round, of figures in `unit`: `ours` and `peer` are what it is made of."""

    name: str
    unit: str
    target: Target = field(default_factory=Target)
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def add(self, ours: float, peer: float) -> None:
        """One round."""
        self.ours.append(ours)
        self.peer.append(peer)

    @property
    def by_round(self) -> list[float]:
        """The ratio within each round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the ends of its bootstrap interval of 95 %."""
    draw = random.Random(_SEED)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return statistics.median(values), medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rounds(count: int, steps: Mapping[str, Callable[[], None]]) -> None:
    """Runs all steps `count` times, every second time in the reverse order, so that none always comes first."""
    total, done = count * len(steps), 0
    for i in range(count):
        for name, step in list(steps.items())[:: -1 if i % 2 else 1]:
            progress(f"round {i + 1} of {count}: {name}", done / total)
            step()
            done += 1
    progress("", 1.0)


def progress(what: str, share: float) -> None:
    """A line that is written over, at a terminal."""
    if sys.stderr.isatty():
        end = "\n" if share >= 1.0 else ""
        bar = "#" * round(30 * share)
        print(f"\r\033[K[{bar:<30}] {share:4.0%} {what}", end=end, file=sys.stderr, flush=True)


def report(bench: str, ratios: Sequence[Ratio], runs: int, also: Mapping[str, float] | None = None) -> None:
    """Prints the table, and the closing line. `also` are ratios that were measured otherwise."""
    print(f"\n{'ratio':<28}{'median':>8}  {'95 % interval':<16}{'target':<9}{'ours':>11}{'peer':>11}  unit")
    medians: dict[str, float] = dict(also or {})
    spread: dict[str, list[float]] = {}
    for ratio in ratios:
        median, low, high = interval(ratio.by_round)
        medians[ratio.name], spread[ratio.name] = round(median, 4), [round(low, 4), round(high, 4)]
        ours, peer = statistics.median(ratio.ours), statistics.median(ratio.peer)
        missed = "" if ratio.target.met(median) else "  MISSED"
        between = f"{low:.2f} to {high:.2f}"
        print(
            f"{ratio.name:<28}{median:>8.2f}  {between:<16}{ratio.target!s:<9}{ours:>11,.1f}{peer:>11,.1f}  "
            f"{ratio.unit}{missed}"
        )
    print(json.dumps({"bench": bench, "ratios": medians, "spread": spread, "runs": runs}), flush=True)
