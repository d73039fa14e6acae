"""Writes what a learner holds into a folder, beside learning: weights first, for whoever serves them, then the rest.

save ─▶ model ──(grace, unless in a hurry)──▶ read out of memory ─▶ written, one file a rank ─▶ index
                                                    └─▶ the optimizer may change it
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import ranks, shards
from trainer.background import Background
from trainer.engine import Fragment

_WRITE_SECONDS = 1800.0
"""How long all ranks together may take to write a training checkpoint."""


class Saver:
    """Saves, one after the other."""

    def __init__(self) -> None:
        self._writing = Background("checkpoint-writer")
        self.captured = threading.Event()
        """Set while nothing is to be read out of the memory that the optimizer changes."""
        self.captured.set()
        self._hurry = threading.Event()

    def save(
        self,
        folder: Path,
        fragments: Sequence[Fragment],
        more: Mapping[str, Tensor],
        index: Mapping[str, Any],
        write_model: Callable[[], None],
        grace: float,
    ) -> Background:
        """Runs `write_model`; then writes this rank's `fragments` and `more` into `folder`, where `index` counts a file
        of it. Rank 0 writes the index, and waits for the others' files. What is returned ends with all of it.
        `model_saved` is done with the first part, for `grace` seconds after which nothing is written, unless somebody
        is in a hurry.
        """
        rank, files = ranks.rank(), index["files"]
        self.wait()
        self.captured.clear()
        self._hurry.clear()

        def write_weights() -> None:
            try:
                write_model()
            except BaseException:
                self.captured.set()
                raise

        def write() -> None:
            self._hurry.wait(grace)
            if rank < files:
                shards.write(folder / shards.file_name(rank), fragments, more, self.captured.set)
            self.captured.set()
            if rank == 0:
                shards.write_index(folder, index)
                shards.await_all(folder, files, _WRITE_SECONDS)

        self.model_saved = self._writing.submit(write_weights)
        self._writing.submit(write)
        return self._writing

    def hurry(self) -> None:
        """Ends the time of grace of what is being saved."""
        self._hurry.set()

    def wait(self) -> None:
        """Waits until all is written. Raises what kept it from that."""
        self.hurry()
        self._writing.wait()

    def close(self) -> None:
        """Lets go, when all that is being saved is written. Raises as `wait`."""
        self.hurry()
        self._writing.close()
