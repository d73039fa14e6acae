"""Event files hold what was measured, under names that TensorBoard groups."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from trainer.board import Board


def events(folder: Path) -> list[Event]:
    """The records of its event files: length, checksum, bytes, checksum (TFRecord)."""
    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 12 + length + 4
    return found


def test_steps_and_rounds_become_curves(tmp_path: Path) -> None:
    board = Board(tmp_path / "policy")
    board.step(7, {"loss": 0.5, "margin": math.nan})
    board.round(2, {"kl": 1.25})
    found = [(v.tag, e.step, v.simple_value) for e in events(tmp_path / "policy") for v in e.summary.value]
    assert found == [("step/loss", 7, 0.5), ("round/kl", 2, 1.25)]
    board.close()
