"""The demo on the real model, shortened to one turn: what it prints is what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import free_base_port


@pytest.mark.timeout(2100)
def test_the_demo_turns_the_wheel_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thumbwheel.cli", "demo", "--versions", "1", "--comparisons-per-version", "8"]
    command += ["--questions", "24", "--deadline-minutes", "32"]
    command += ["--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    command += ["--base-port", str(free_base_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2000)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests_failed"] == 0
    assert 2 * 24 < figures["requests"] < 2 * 96  # both versions were asked 24 questions
    assert figures["feedback_lost"] == 0
    assert figures["feedback_trained"] == 8
    assert figures["feedback_acked"] == 8 + figures["feedback_apart"]
    assert figures["versions_published"] == 1
    assert figures["swaps"] == 2
    assert figures["peak_memory_bytes"] < 12 * 2**30
    assert 0 < figures["feedback_to_live_seconds_p50"] <= figures["feedback_to_live_seconds_p95"]
    assert figures["fluent_share_after"] >= 0.9
    plot = tmp_path / "out" / "concise-seed0.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(plot.with_suffix(".json").read_text()) == figures
    assert not (tmp_path / "home" / "store").exists()


def test_an_unknown_preference_is_named() -> None:
    command = [sys.executable, "-m", "thumbwheel.cli", "demo", "--preference", "loud"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--preference: is 'loud'. Use one of concise" in done.stderr
