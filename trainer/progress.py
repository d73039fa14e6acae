"""A progress line for people at a terminal. Logs and metrics are for everybody else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from trainer.learner import StepReport


_TELLING = ("margin", "accuracy", "kl", "nll", "clip_fraction", "value_loss")


@contextlib.contextmanager
def line(task: str) -> Iterator[Callable[[StepReport], None]]:
    """Yields what is to be called after every step; it draws only where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda report: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(f"{task}: preparing", total=None)

        def on_step(report: StepReport) -> None:
            text = f"{task}: {summary(report)}"
            bar.update(row, description=text, total=report.steps, completed=report.step)

        yield on_step


def summary(report: StepReport) -> str:
    """A step in a few words: its loss, and what tells most of the objective."""
    shown = [f"{name} {value:.3f}" for name, value in report.measures.items() if name.endswith(_TELLING)]
    return ", ".join([f"loss {report.loss:.3f}", *shown])


def fields(report: StepReport) -> dict[str, float]:
    """A step as fields of a log entry."""
    return {"step": report.step, "steps": report.steps, "samples": report.samples, **report.numbers()}
