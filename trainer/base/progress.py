"""What a person sees while a model is being fetched: the step, its bytes, and how long it will take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console

from thumbwheel import files

_POLL_SECONDS = 0.2


class Progress:
    """A bar a step on standard error, or nothing at all."""

    def __init__(self, *, shown: bool) -> None:
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @contextmanager
    def step(self, what: str, folder: Path, total: int) -> Iterator[None]:
        """Shows how far `folder` has grown towards `total` bytes while the block runs."""
        if self._bar.disable:
            yield
            return
        task = self._bar.add_task(what, total=total)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                self._bar.update(task, completed=min(files.tree_size(folder), total))

        watcher = threading.Thread(target=watch, name="fetch-progress", daemon=True)
        watcher.start()
        try:
            yield
            self._bar.update(task, completed=total)
        finally:
            ended.set()
            watcher.join()
