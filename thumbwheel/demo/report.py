"""What the demo measured: a table for the terminal and a plot for a file, a row or a point a version."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Z95 = 1.959963984540054
"""Half-width of a 95 % interval, in standard deviations of the normal distribution."""

_INK, _GRID, _RATE, _REWARD = "#22313f", "#d9dee3", "#2a6fbb", "#c9622b"
_STYLE: Any = {"font.size": 10.5} | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def share(cls, hits: int, count: int) -> Self:
        """`hits` of `count` with Wilson's score interval (Wilson 1927). Raises ValueError where `count` is 0."""
        if count <= 0:
            raise ValueError("count: a share of nothing has no value; measure at least one answer")
        rate, z2 = hits / count, Z95**2
        centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
        half = Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
        # At 0 and 1 the bound equals the rate but for rounding.
        return cls(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))

    @classmethod
    def mean(cls, values: Sequence[float]) -> Self:
        """Mean of `values` and its normal interval; of one value, that value alone. Raises ValueError for none."""
        if not values:
            raise ValueError("values: the mean of nothing has no value; measure at least one answer")
        mean = statistics.fmean(values)
        half = Z95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Row:
    """One policy version, as measured on the held-out prompts."""

    version: str
    """Its name, such as `policy-000003`."""

    count: int
    """Answers measured."""

    rate: Estimate
    """Share of answers that show what people prefer."""

    fluent: float
    """Share of fluent answers."""

    words: float
    """Mean length of an answer in words."""

    reward: Estimate | None
    """Mean raw score of the reward model; None where nothing was scored."""

    @classmethod
    def measure(
        cls,
        *,
        version: str,
        shows: Sequence[bool],
        fluent: Sequence[bool],
        answers: Sequence[str],
        rewards: Sequence[float],
    ) -> Self:
        """From one entry an answer in each; `rewards` may be empty.

        Raises:
            ValueError: there is no answer, or the sequences differ in length.
        """
        if len({len(shows), len(fluent), len(answers)} | ({len(rewards)} if rewards else set())) != 1:
            raise ValueError(
                f"{version}: {len(shows)} shows, {len(fluent)} fluent, {len(answers)} answers, {len(rewards)} rewards; "
                "give one of each for every answer"
            )
        return cls(
            version=version,
            count=len(answers),
            rate=Estimate.share(sum(shows), len(shows)),
            fluent=sum(fluent) / len(fluent),
            words=statistics.fmean(len(answer.split()) for answer in answers),
            reward=Estimate.mean(rewards) if rewards else None,
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, 0 to 100, with linear interpolation between neighbours; NaN for no values.

    Raises:
        ValueError: `percent` is outside 0 to 100.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent:g}; use 0 to 100")
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def print_table(rows: Sequence[Row], console: Console, *, preference: str) -> None:
    """Prints one line a version, in the order given; intervals are 95 %."""
    table = Table(title=f"Answers to held-out questions: how many are {preference}?", title_justify="left")
    table.add_column("version", no_wrap=True)
    for heading in ("share", "95 %", "fluent", "words", "reward", "answers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        reward = row.reward
        table.add_row(
            row.version,
            f"{row.rate.value:.0%}",
            f"{100 * row.rate.low:.0f} to {100 * row.rate.high:.0f}",
            f"{row.fluent:.0%}",
            f"{row.words:.0f}",
            f"{reward.value:+.2f} ± {reward.high - reward.value:.2f}" if reward else "",
            str(row.count),
        )
    console.print(table)


def save_plot(rows: Sequence[Row], path: Path, *, preference: str) -> None:
    """Draws rate and reward by version, with 95 % intervals, into a PNG file at `path`.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows: there is nothing to draw; measure at least one version")
    # Imported here, for matplotlib takes longer to load than everything else that the command line needs.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    places = list(range(len(rows)))
    scored = [(place, row.reward) for place, row in zip(places, rows, strict=True) if row.reward is not None]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            2 if scored else 1, 1, sharex=True, squeeze=False, figsize=(7.2, 6.4 if scored else 3.8), dpi=150
        )
        rate = axes[0, 0]
        _points(rate, places, [row.rate for row in rows], _RATE)
        rate.set_ylabel(f"answers that are {preference}\n(% of held-out questions)")
        rate.set_ylim(0, 1.1)
        rate.set_yticks([0, 0.25, 0.5, 0.75, 1])
        rate.yaxis.set_major_formatter(PercentFormatter(1.0))
        for place, row in zip(places, rows, strict=True):
            rate.annotate(
                f"{row.rate.value:.0%}",
                (place, row.rate.value),
                textcoords="offset points",
                xytext=(-9, 6),
                ha="right",
                color=_RATE,
                fontweight="bold",
            )
        if scored:
            reward = axes[1, 0]
            _points(reward, [place for place, _ in scored], [value for _, value in scored], _REWARD)
            reward.set_ylabel("reward of an answer\n(last reward model's raw score)")
            reward.axhline(0, color=_INK, linewidth=0.8, zorder=1)
        last = axes[-1, 0]
        last.set_xlabel("policy version (trainer's sequence number; 0 is the base model)")
        last.set_xticks(places, [_short(row.version) for row in rows])
        last.set_xlim(-0.35, len(rows) - 0.55)
        figure.suptitle(
            f"Users prefer {preference} answers: what each policy version gives them", fontsize=13, x=0.5, y=0.975
        )
        caption = f"{min(row.count for row in rows)} answers a version; bars are 95 % intervals"
        figure.text(0.5, 0.925 if scored else 0.885, caption, ha="center", fontsize=9.5, alpha=0.8)
        figure.align_ylabels()
        figure.tight_layout(rect=(0, 0, 1, 0.955 if scored else 0.93), h_pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _points(axis: Axes, places: Sequence[int], values: Sequence[Estimate], colour: str) -> None:
    heights = [value.value for value in values]
    spread = [[value.value - value.low for value in values], [value.high - value.value for value in values]]
    axis.errorbar(
        places, heights, spread, color=colour, linewidth=2, marker="o", markersize=7, capsize=5, elinewidth=1.3
    )
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _short(version: str) -> str:
    """`policy-000003` as `3`; any other name as it is."""
    number = version.rpartition("-")[2]
    return str(int(number)) if number.isdecimal() else version
