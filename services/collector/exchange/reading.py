"""Reading a file of rows in constant memory: what is in a line, or why it cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from services.collector.exchange import formats
from services.collector.exchange.rows import Row, RowError
from thumbwheel import errors

MAX_LINE_BYTES = 1 << 20
"""Longest row: its events must fit into records of the stream."""


class Line(NamedTuple):
    """A line of the file: its row, or why there is none. `position` is in bytes of the file, compressed or not."""

    number: int
    row: Row | None
    reason: str
    position: int


def read(path: Path, name: str) -> Iterator[Line]:
    """The lines of a file in the format `name`; "auto" is the format of the first row that is of any. Blank lines are
    passed over, and a name that ends in .gz is decompressed.

    Raises `errors.FailedPrecondition` where the file cannot be read.
    """
    try:
        with path.open("rb") as raw:
            lines: IO[bytes] = raw
            if path.suffix == ".gz":
                lines = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]  # it reads lines as a file does
            for number, (line, whole) in enumerate(_lines(lines), start=1):
                if not line.strip():
                    continue
                try:
                    fields = _fields(line, whole)
                    if name == formats.AUTO:
                        name = formats.detect(fields)
                    yield Line(number, formats.FORMATS[name].parse(fields), "", raw.tell())
                except RowError as error:
                    yield Line(number, None, str(error), raw.tell())
    except (OSError, EOFError) as error:
        raise errors.FailedPrecondition(
            f"{path} cannot be read: {error}.", remedy="What came before it was taken; give the path of a whole file."
        ) from error


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The lines, each with whether it is whole: what is beyond the longest line is skipped, not kept."""
    first = True
    while line := file.readline(MAX_LINE_BYTES + 1):
        whole = len(line) <= MAX_LINE_BYTES
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            whole = False
        yield (line.removeprefix(b"\xef\xbb\xbf") if first else line), whole
        first = False


def _fields(line: bytes, whole: bool) -> dict[str, object]:
    if not whole:
        raise RowError(f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError:
        raise RowError("is not UTF-8") from None
    except ValueError as error:
        raise RowError(f"is no JSON: {error.args[0] if error.args else error}") from None
    except RecursionError:
        raise RowError("is no JSON that can be read: it is nested too deep") from None
    if not isinstance(fields, dict):
        raise RowError("is no JSON object")
    return fields
