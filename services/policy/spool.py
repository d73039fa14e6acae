"""The spool: a bounded queue on disk between serving and the broker.

    append ──▶ events, in order ──▶ read ──▶ sent, acknowledged ──▶ advance
                    │
                    └── over `limit` bytes: the oldest go first, whether the broker has them or not

What the broker has acknowledged stays until its place is needed, so that it can be sent again when a broker that keeps
all in memory is restarted. One SQLite file in WAL mode, held by one process at a time. A commit is in the file when
`append` returns, so a killed process loses nothing of it; it is forced to the disk at checkpoints only, so a power cut
may cost the last moments and never the file: records of what was served are not worth a disk's delay each.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from thumbwheel import errors, files

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL,
    key BLOB NOT NULL,
    value BLOB NOT NULL,
    traceparent TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_FORMAT = 1
_OVERHEAD_BYTES = 64  # of a row, beside its value; measured to within a few bytes
_DROP_BATCH = 256


Doomed: TypeAlias = Callable[[bytes], bool]
"""Whether an event, serialised, is to be erased."""


class Entry(NamedTuple):
    """An event to be kept."""

    event_id: str
    key: bytes
    value: bytes
    traceparent: str = ""


class Row(NamedTuple):
    """An event as kept; ids rise by one in the order of appending."""

    id: int
    event_id: str
    key: bytes
    value: bytes
    traceparent: str = ""


class Spool:
    """Events in the order in which they came, at most `limit` bytes of them. For one thread at a time.

    Opening raises `errors.FailedPrecondition` where another process holds the file, or it is not a spool. Opening and
    all methods raise `errors.NoSpace` where the disk is full, `errors.Unavailable` where it fails otherwise.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        self._path, self._limit = path, limit
        with files.space_errors(path.parent, 1_000_000, "the spool"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open()
        self._acked, self._first, self._last, self._bytes = self._measure()

    @property
    def bytes(self) -> int:
        """Bytes of the events held."""
        return self._bytes

    @property
    def held(self) -> int:
        """Events held."""
        return self._last - self._first + 1

    @property
    def waiting(self) -> int:
        """Events held that the broker has not acknowledged."""
        return self._last - max(self._acked, self._first - 1)

    def append(self, entries: Sequence[Entry]) -> int:
        """Keeps events. Returns how many that the broker does not have had to go for them, the oldest first."""
        size = self._bytes + sum(_size(len(entry.key), len(entry.value)) for entry in entries)
        first, last = self._first, self._last + len(entries)
        with self._faults(), self._connection:
            rows = zip(range(self._last + 1, last + 1), *zip(*entries, strict=True), strict=True)
            insert = "INSERT INTO events (id, event_id, key, value, traceparent) VALUES (?, ?, ?, ?, ?)"
            self._connection.executemany(insert, rows)
            while size > self._limit:
                oldest = self._connection.execute(
                    "SELECT length(key), length(value) FROM events WHERE id >= ? ORDER BY id LIMIT ?",
                    (first, _DROP_BATCH),
                ).fetchall()
                if not oldest:
                    break
                for key, value in oldest:
                    size -= _size(key, value)
                    first += 1
                    if size <= self._limit:
                        break
            self._connection.execute("DELETE FROM events WHERE id < ?", (first,))
        # After the commit: a fault leaves the counts as they were, like the file.
        unsent = max(0, first - max(self._first, self._acked + 1))
        self._first, self._last, self._bytes = first, last, size
        return unsent

    def read(self, limit: int) -> list[Row]:
        """The oldest events that the broker has not acknowledged."""
        with self._faults():
            columns = ", ".join(Row._fields)
            rows = self._connection.execute(
                f"SELECT {columns} FROM events WHERE id > ? ORDER BY id LIMIT ?", (self._acked, limit)
            )
            return [Row(*row) for row in rows]

    def advance(self, acked: int) -> None:
        """The broker has everything up to the id `acked`. For this process that holds even where saving it fails."""
        self._save_acked(max(acked, self._acked))

    def rewind(self) -> int:
        """The broker lost what it held: everything held waits again. Returns how much that is."""
        self._save_acked(0)
        return self.waiting

    def erase(self, doomed: Doomed) -> int:
        """Erases events by what they hold, so that nothing of them is left in the file. Returns how many.

        Their places stay, with nothing in them: ids rise by one without a gap.
        """
        with self._faults():
            rows = self._connection.execute("SELECT id, key, value FROM events WHERE length(value) > 0")
            gone = [(id, len(key) + len(value)) for id, key, value in rows if doomed(value)]
            if not gone:
                return 0
            with self._connection:
                empty = "UPDATE events SET key = x'', value = x'', traceparent = '' WHERE id = ?"
                self._connection.executemany(empty, [(id,) for id, _ in gone])
            self._bytes -= sum(size for _, size in gone)
            # What was deleted is in free pages and in the log until both are written anew.
            for statement in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                self._connection.execute(statement).fetchall()
        return len(gone)

    @property
    def topic_ids(self) -> dict[str, str]:
        """The ids of the topics that events were acknowledged for, as last kept."""
        with self._faults():
            ids: dict[str, str] = json.loads(self._load("topic_ids", "{}"))
            return ids

    def keep_topic_ids(self, ids: Mapping[str, str]) -> None:
        """Keeps the topics' ids for the next run."""
        with self._faults(), self._connection:
            self._store("topic_ids", json.dumps(dict(ids), sort_keys=True))

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=0.0, check_same_thread=False)
        try:
            # Exclusive: one process drains a spool, or events would go out of order. The lock ends with the process.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, _FORMAT):
                raise errors.FailedPrecondition(
                    f"{self._path} has format {found}, which this version does not know.",
                    remedy="Start the version that wrote it once more to drain it, or move the file away.",
                )
            with connection:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                if "traceparent" not in {row[1] for row in connection.execute("PRAGMA table_info(events)")}:
                    connection.execute("ALTER TABLE events ADD COLUMN traceparent TEXT NOT NULL DEFAULT ''")
                connection.execute(f"PRAGMA user_version = {_FORMAT}")
        except sqlite3.Error as error:
            connection.close()
            if "locked" in str(error):
                raise errors.FailedPrecondition(
                    f"{self._path} is held by another process.",
                    remedy="Give each policy server of one home a port of its own with --listen.",
                ) from error
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                raise errors.FailedPrecondition(
                    f"{self._path} is not a spool: {error}.", remedy="Move the file away; a new one is made."
                ) from error
            raise self._translated(error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _measure(self) -> tuple[int, int, int, int]:
        """What the broker has, the first id, the last, and the bytes held."""
        with self._faults():
            acked = int(self._load("acked", "0"))
            first, last, size, count = self._connection.execute(
                "SELECT MIN(id), MAX(id), COALESCE(SUM(length(key) + length(value)), 0), COUNT(*) FROM events"
            ).fetchone()
            if count == 0:
                return acked, acked + 1, acked, 0
            return acked, int(first), int(last), int(size) + int(count) * _OVERHEAD_BYTES

    def _save_acked(self, acked: int) -> None:
        self._acked = acked
        with self._faults(), self._connection:
            self._store("acked", str(acked))

    def _load(self, name: str, default: str) -> str:
        row = self._connection.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def _store(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO state (name, value) VALUES (?, ?)", (name, value))

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> errors.ThumbwheelError:
        if "full" in str(error):
            return errors.NoSpace(
                f"No space in {self._path.parent} for the spool.", remedy="Free some space there, and it goes on."
            )
        return errors.Unavailable(f"{self._path} cannot be used: {error}.", remedy="Check the disk it lies on.")


def _size(key: int, value: int) -> int:
    return key + value + _OVERHEAD_BYTES
