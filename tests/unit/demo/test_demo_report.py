"""The numbers people are shown, and the picture."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from thumbwheel.demo.report import Estimate, Row, percentile, print_table, save_plot


def _row(version: str, hits: int, rewards: list[float] | None = None) -> Row:
    return Row.measure(
        version=version,
        shows=[index < hits for index in range(10)],
        fluent=[True] * 9 + [False],
        answers=["one two three four"] * 5 + ["one two"] * 5,
        rewards=rewards if rewards is not None else [float(index) for index in range(10)],
    )


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # The last is the example of Newcombe 1998, method 3; the others are solved by hand.
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_a_share_has_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    share = Estimate.share(hits, count)
    assert share.value == hits / count
    assert share.low == pytest.approx(low, abs=1e-4)
    assert share.high == pytest.approx(high, abs=1e-4)


def test_a_mean_has_a_normal_interval() -> None:
    mean = Estimate.mean([1.0, 2.0, 3.0, 4.0])
    assert mean.value == 2.5
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert mean.low == pytest.approx(2.5 - half)
    assert mean.high == pytest.approx(2.5 + half)
    assert Estimate.mean([7.0]) == Estimate(7.0, 7.0, 7.0)


def test_nothing_has_no_share_and_no_mean() -> None:
    with pytest.raises(ValueError, match="count"):
        Estimate.share(0, 0)
    with pytest.raises(ValueError, match="values"):
        Estimate.mean([])


def test_a_row_sums_up_a_version() -> None:
    row = _row("policy-000001", 4)
    assert (row.count, row.rate.value, row.fluent, row.words) == (10, 0.4, 0.9, 3.0)
    assert row.reward is not None
    assert row.reward.value == 4.5


def test_a_row_without_rewards_has_none() -> None:
    assert _row("policy-000001", 4, rewards=[]).reward is None


def test_a_row_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"policy-000001.*3 rewards"):
        _row("policy-000001", 4, rewards=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 95, 3.85),
        ([1.0, 9.0], 0, 1.0),
        ([1.0, 9.0], 100, 9.0),
        ([5.0], 95, 5.0),
    ],
)
def test_percentile_interpolates(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 50))


def test_percentile_refuses_more_than_a_hundred() -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], 101)


def test_the_table_fits_a_narrow_terminal_whole() -> None:
    out = io.StringIO()
    rows = [_row("policy-000000", 0), _row("policy-000001", 10, rewards=[])]
    print_table(rows, Console(file=out, width=80), preference="structured")
    text = out.getvalue()
    assert "…" not in text
    for part in ("policy-000000", "0%", "0 to 28", "90%", "+4.50 ± 1.88", "100%", "72 to 100"):
        assert part in text, part


def _size(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_the_plot_is_a_picture_with_a_panel_for_rewards_where_there_are_any(tmp_path: Path) -> None:
    with_rewards, without = tmp_path / "new" / "with.png", tmp_path / "without.png"
    save_plot([_row("policy-000000", 1), _row("policy-000001", 9)], with_rewards, preference="concise")
    save_plot([_row("policy-000000", 1, rewards=[])], without, preference="concise")
    assert _size(with_rewards) == (1080, 960)
    assert _size(without) == (1080, 570)


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows"):
        save_plot([], tmp_path / "none.png", preference="concise")


def test_importing_the_report_does_not_load_matplotlib() -> None:
    code = "import sys, thumbwheel.demo.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
