"""The closing lines of `make faults` and `make soak`: sums, worst values, slopes."""

from __future__ import annotations

import sys

import pytest

from bench import soak
from tests.faults import alerted, run
from tests.faults.alerted import Outcome
from tests.faults.checker import Verdict


def test_the_worst_of_all_faults_is_told() -> None:
    outcomes = [
        Outcome("a", "sqlite", "X", 1, 0.25),
        Outcome("b", "sqlite", "", None, 4.0),
        Outcome("late", "sqlite", "X", 3, 1.0),
        Outcome("slow", "postgres", "X", 2, 5.5),
    ]
    verdict = Verdict(lost=["one"], counts={"acknowledged": 10})
    line = alerted.summary(outcomes, [verdict, verdict], [1.01, 1.2], 7)
    assert line == {
        "faults": "alerted",
        "seed": 7,
        "injected": 4,
        "alerted": 3,
        "most_evaluations": 3,
        "most_recovery_seconds": 5.5,
        "lost": 2,
        "doubled": 0,
        "reordered": 0,
        "wrong": 0,
        "retries": 1.2,
        "acknowledged": 20,
        "missed": ["sqlite: late", "postgres: slow"],
    }


def test_lines_add_up_and_what_failed_is_named() -> None:
    first = run.closing('some words\n{"injected": 3, "lost": 1, "retries": 1.02, "most_evaluations": 1.5}\n')
    second = run.closing('{"kills": 10, "lost": 0, "acknowledged": 5, "most_recovery_seconds": 2.5}')
    assert run.closing("Traceback: it broke") == run.closing("") == run.closing("[1]") == {}
    total = run.total([first, second, {}], ["tests.faults.parts"], 61.4)
    assert (total["injected"], total["lost"], total["acknowledged"]) == (13, 1, 5)
    assert (total["most_evaluations"], total["most_recovery_seconds"], total["retries"]) == (1.5, 2.5, 1.02)
    assert (total["failed"], total["seconds"]) == (["tests.faults.parts"], 61)


def test_what_a_command_prints_is_told_as_it_comes(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('first', flush=True); print('{}'); sys.exit(3)"
    assert run.told([sys.executable, "-c", code]) == ("first\n{}\n", 3)
    assert capfd.readouterr().out == "first\n{}\n"


def test_both_forms_run_every_kind() -> None:
    for long in (False, True):
        modules = {command[command.index("-m") + 1] for command in run.commands([1], long=long)}
        assert {"tests.faults.alerted", "tests.faults.parts", "tests.faults.collector"} <= modules
    assert len(run.commands(range(10), long=True)) > 4 * len(run.commands([1], long=False))


def test_slopes_are_an_hours_and_leave_out_the_first_third() -> None:
    """A part that grows 60 MiB in its first minute of three, then 1 MiB a minute."""
    found = soak.Soak(calls=10, version="policy-000002", swaps=2)
    for second in range(0, 180, 5):
        grown = min(second, 60) * 2**20 + max(0, second - 60) * 2**20 // 60
        calls = [20.0 if second >= 120 else 10.0] * 4
        found.samples.append(soak.Sample(float(second), {"policy": grown}, {"policy": 7}, {"store": 0}, calls))
    line = soak.summary(found, 3.0)
    assert line["memory_mib_per_hour"]["policy"] == pytest.approx(60.0, rel=0.02)
    assert line["files_per_hour"] == {"policy": 0.0}
    assert line["latency_drift"] == {"p50": 2.0, "p95": 2.0}
    assert line["memory_mib"] == {"policy": 62}
