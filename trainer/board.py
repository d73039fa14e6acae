"""Event files for TensorBoard: `tensorboard --logdir HOME/tensorboard` draws them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """The event files of one task, in `folder`. A process that goes on from a checkpoint goes on in the same curves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cached_property
    def _writer(self) -> Any:
        # Below its SummaryWriter, which hands everything to a thread of its own and flushes what has arrived there.
        from tensorboardX.event_file_writer import EventsWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        return EventsWriter(str(self._folder / "events"))

    def step(self, number: int, measured: Mapping[str, float]) -> None:
        """What was measured at an optimizer step, counted from the base model on."""
        self._write("step", number, measured)

    def round(self, number: int, measured: Mapping[str, float]) -> None:
        """What was measured in a round; it is on disk when this returns."""
        self._write("round", number, measured)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        if "_writer" in vars(self):
            self._writer.close()

    def _write(self, group: str, number: int, measured: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in measured.items()
            if math.isfinite(value)
        ]
        self._writer.write_event(Event(wall_time=time.time(), step=number, summary=Summary(value=values)))
