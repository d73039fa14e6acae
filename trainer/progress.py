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
            text = f"{task}: loss {report.loss:.3f}, margin {report.margin:+.3f}, right {report.accuracy:.0%}"
            bar.update(row, description=text, total=report.steps, completed=report.step)

        yield on_step
