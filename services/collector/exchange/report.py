"""The report of what was refused, beside the file: for each row its line and the reason, and nothing of its content."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SUFFIX = ".refused.jsonl"


class Refusals:
    """Counts refused rows, and writes them down. There is a report only where a row was refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self._file: IO[str] | None = None

    @property
    def count(self) -> int:
        """How many rows."""
        return self.reasons.total()

    def add(self, reason: str, **where: int | str) -> None:
        """Notes a row. `where` says which one it is."""
        if self._file is None:
            self._file = self.path.open("w")
        self.reasons[reason] += 1
        self._file.write(json.dumps({**where, "reason": reason}) + "\n")

    def close(self) -> None:
        """Ends the report."""
        if self._file is not None:
            self._file.close()


@contextmanager
def refusals(file: Path) -> Iterator[Refusals]:
    """The report beside a file; that of an earlier run is replaced."""
    path = file.with_name(file.name + SUFFIX)
    path.unlink(missing_ok=True)
    report = Refusals(path)
    try:
        yield report
    finally:
        report.close()
