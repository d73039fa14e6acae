"""A wall clock that jumps while a process runs.

libfaketime also replaces how threads wait, and a collector below it hung now and then: this replaces what tells the
time alone.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


class Clock:
    """What the processes that are started with its `environment` take for the time of day."""

    def __init__(self, home: Path) -> None:
        library = home / "clock.so"
        command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, timeout=60.0)
        except FileNotFoundError:
            raise FileNotFoundError("gcc is not there. On Debian type: sudo apt-get install gcc libc6-dev") from None
        self._offset = home / "clock.offset"
        self._offset.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offset)}

    def jump(self, seconds: int) -> None:
        """It is off by `seconds` from now on."""
        with self._offset.open("r+b") as file:  # in place: processes look at this very file
            file.write(struct.pack("=q", seconds))
