"""The database: SQLite on one machine, PostgreSQL beyond, and one way of writing for both.

    write ──▶ queue ──▶ writer thread: BEGIN · every write that waits · COMMIT ──▶ futures

One thread writes the record. While it waits for the disk, further writes queue up and share the next commit, so a
commit's cost is spread over all that came meanwhile, and nothing blocks the event loop. A future resolves after the
commit: what it brings is durable. Where a write raises, all are run again, each in a savepoint, so that it undoes
itself alone. What is acknowledged comes in elsewhere, through the `door`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import alembic.command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError

from services.collector import sqlite
from services.collector.faults import require_open, require_room, too_long, translate
from services.collector.sqlite import READS, WRITES_BOTH, WRITES_INBOX, WRITES_RECORD
from thumbwheel import errors

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], T]

_LASTING = (IntegrityError, DataError, ProgrammingError)
"""Faults of what is written, and not of the database: trying again helps nobody."""

MAX_WRITES = 128
READERS = 2
_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class _Write:
    """A write that waits for its turn."""

    work: Callable[..., Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    alone: bool = False
    """Not in a transaction, and not beside any other write."""


class _Outcome(NamedTuple):
    """What a write came to: an exception is its failure."""

    write: _Write
    result: Any


class _Raised(Exception):
    """A write raised: what it did is to be undone. Not an error of the database."""


class Database:
    """The collector's database, migrated and open. Raises `errors.FailedPrecondition` where it cannot be opened."""

    def __init__(self, url: str, *, max_pending: int = 4_096, timeout: float = 15.0) -> None:
        self._url, self._engine = _engine(url)
        self._timeout = timeout
        self._max_pending = max_pending
        if self._engine.dialect.name == "sqlite":
            self._prepare_sqlite()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="database-reader")
        self._closed = False
        try:
            self._connection = self._engine.connect()
            migrate(self._connection)
        except (DBAPIError, OSError) as error:
            self._engine.dispose()
            raise self._translate(error) from error
        self._writer = threading.Thread(target=self._write_forever, name="database-writer", daemon=True)
        self._writer.start()

    @property
    def dialect(self) -> str:
        """Which database it is: sqlite or postgresql."""
        return self._engine.dialect.name

    async def write(self, work: Work[T]) -> T:
        """Runs `work` in the next transaction and returns what it returned, once that is durable.

        Raises what `work` raised, `errors.NoSpace`, `errors.Unavailable`, `errors.ResourceExhausted` where too many
        wait, and `errors.DeadlineExceeded`, after which the write may still be made. `work` may run twice, of which
        only the last run counts.
        """
        self._admit()
        return await self._wait(self._enqueue(work))

    def write_now(self, work: Work[T]) -> T:
        """As `write`, in the caller's thread, beside the writer's transactions. What the database will never take is
        raised as SQLAlchemy does.
        """
        return self._now(work, WRITES_RECORD)

    def write_all_now(self, work: Work[T]) -> T:
        """As `write_now`, for work that writes the record and the inbox. Only a crash can part the two."""
        return self._now(work, WRITES_BOTH)

    def write_inbox_now(self, work: Work[T]) -> T:
        """As `write_now`, for work that writes the inbox alone."""
        return self._now(work, WRITES_INBOX)

    def tidy(self) -> None:
        """Copies the inbox's write-ahead log into its file, as far as nobody reads it: the door leaves that to us."""
        if self.dialect == "sqlite":
            self.maintain_inbox_now(sqlite.checkpoint_inbox)

    def maintain_inbox_now(self, work: Callable[[Any], T]) -> T:
        """Runs `work` on a driver's connection that has the inbox, in no transaction, in the caller's thread."""
        with self._engine.connect().execution_options(mode=WRITES_INBOX) as connection:
            connection.rollback()
            if self.dialect == "sqlite":
                sqlite.attach(connection)
            return self._maintained(connection, work)

    @contextlib.contextmanager
    def door(self) -> Iterator[Connection]:
        """A connection whose transactions read all and write to the inbox alone. It leaves cleaning up to others."""
        with self._engine.connect().execution_options(mode=WRITES_INBOX) as connection:
            if self.dialect == "sqlite":
                sqlite.leave_log(connection)
            yield connection

    async def maintain(self, work: Callable[[Any], T]) -> T:
        """Runs `work` on the driver's own connection, in no transaction, while nothing else writes, and returns what it
        returned: for what a database does only there, such as VACUUM. Has no deadline but those that `work` keeps.

        Raises what `work` raised, and as `write` does.
        """
        return await self.turn(lambda: self._maintained(self._connection, work))

    async def turn(self, work: Callable[[], T]) -> T:
        """Runs `work` while nothing else of this process writes the record, as `maintain` does, but on no connection:
        for a process that writes it in our stead.
        """
        if self._closed:
            raise errors.Unavailable("The collector is stopping.", remedy="It goes on at the next start.")
        return await self._enqueue(work, alone=True)

    async def read(self, work: Work[T]) -> T:
        """Runs `work` in a read-only view of what is committed. Raises what `work` raised, and as `write` does."""
        return await self._wait(asyncio.wrap_future(self._readers.submit(self.read_now, work)))

    def read_now(self, work: Work[T]) -> T:
        """As `read`, in the caller's thread."""
        try:
            return self._in_transaction(work, READS)
        except DBAPIError as error:
            raise self._translate(error) from error

    def _now(self, work: Work[T], mode: str) -> T:
        try:
            try:
                return self._in_transaction(work, mode)
            except IntegrityError:  # another collector on this database was faster: run again, the write sees it
                return self._in_transaction(work, mode)
        except _LASTING:
            raise
        except DBAPIError as error:
            raise self._translate(error) from error

    def _in_transaction(self, work: Work[T], mode: str) -> T:
        with self._engine.connect().execution_options(mode=mode) as connection, connection.begin():
            return work(connection)

    def snapshot(self, work: Callable[[Connection], Iterator[T]]) -> Iterator[T]:
        """What `work` yields, all of it from one moment, while writes go on. For long reads, in the caller's thread."""
        level = "SERIALIZABLE" if self.dialect == "sqlite" else "REPEATABLE READ"
        try:
            with self._engine.connect() as plain:
                connection = plain.execution_options(mode=READS, isolation_level=level)
                with connection.begin():
                    yield from work(connection)
        except DBAPIError as error:
            raise self._translate(error) from error

    def close(self) -> None:
        """Makes durable what waits, then lets go of the database."""
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._readers.shutdown()
        self._connection.close()
        self._engine.dispose()

    def _admit(self) -> None:
        require_open(closed=self._closed)
        require_room(self._queue.qsize(), self._max_pending, "writes")

    def _enqueue(self, work: Callable[..., T], *, alone: bool = False) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Write(work, loop, future, alone))
        return future

    async def _wait(self, future: asyncio.Future[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise too_long(self._timeout) from None

    def _translate(self, error: DBAPIError | OSError) -> errors.ThumbwheelError:
        return translate(error, self._url)

    def translated(self, error: DBAPIError) -> Exception:
        """The error to raise for a fault of this database. A key that is taken stays as it is: that is no fault."""
        return error if isinstance(error, IntegrityError) else self._translate(error)

    def _prepare_sqlite(self) -> None:
        if self._url.database:
            try:
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._translate(error) from error
        sqlite.listen(self._engine)

    def _write_forever(self) -> None:
        while (first := self._queue.get()) is not None:
            alone = first if first.alone else None
            batch, stop = ([] if first.alone else [first]), False
            while len(batch) < MAX_WRITES and alone is None and not stop:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stop = True
                elif following.alone:
                    alone = following
                else:
                    batch.append(following)
            _tell(self._commit([write for write in batch if not write.future.cancelled()]))
            if alone is not None and not alone.future.cancelled():
                _tell([self._maintain(alone)])
            if stop:
                return

    def _maintain(self, task: _Write) -> _Outcome:
        try:
            return _Outcome(task, task.work())
        except Exception as error:  # noqa: BLE001  # it goes to the caller, whatever it is
            return _Outcome(task, error)

    def _maintained(self, on: Connection, work: Callable[[Any], T]) -> T:
        """What `work` returns on the driver's own connection, in no transaction. Raises as `maintain` does."""
        connection: Any = on.connection.driver_connection
        plain = self.dialect == "sqlite"  # there, transactions are begun by hand
        try:
            if not plain:
                connection.autocommit = True
            return work(connection)
        except self._engine.dialect.loaded_dbapi.Error as error:
            raise self._translate(DBAPIError("maintenance", None, error)) from error
        finally:
            if not plain:
                connection.autocommit = False

    def _commit(self, batch: Sequence[_Write], *, again: bool = True) -> list[_Outcome]:
        """Makes the batch durable in one transaction; where that fails, each write in one of its own."""
        try:
            return self._transact(batch)
        except DBAPIError as error:
            # A key that exists by now: another collector on this database was faster. Run again, the write sees it.
            clash = isinstance(error, IntegrityError)
            if len(batch) > 1 or (clash and again):
                return [outcome for write in batch for outcome in self._commit([write], again=len(batch) > 1)]
            return [_Outcome(write, self.translated(error)) for write in batch]

    def _transact(self, batch: Sequence[_Write]) -> list[_Outcome]:
        """Runs all in one transaction, and commits. Savepoints cost as much as a small write: first without."""
        try:
            with self._connection.begin():
                return self._run(batch)
        except _Raised as raised:
            if len(batch) == 1:
                return [_Outcome(batch[0], raised.__cause__)]
        with self._connection.begin():
            return [outcome for write in batch for outcome in self._run_undoably(write)]

    def _run(self, batch: Sequence[_Write]) -> list[_Outcome]:
        """What the writes came to. Raises `_Raised`, and faults of the database: they concern the whole transaction."""
        outcomes: list[_Outcome] = []
        try:
            for write in batch:
                outcomes.append(_Outcome(write, write.work(self._connection)))
        except DBAPIError:
            raise
        except Exception as error:
            raise _Raised from error
        return outcomes

    def _run_undoably(self, write: _Write) -> list[_Outcome]:
        try:
            with self._connection.begin_nested():
                return self._run([write])
        except _Raised as raised:
            return [_Outcome(write, raised.__cause__)]


def _tell(outcomes: Sequence[_Outcome]) -> None:
    """Resolves the futures, each in its event loop, which is woken once for all."""
    for loop, group in groupby(outcomes, lambda outcome: outcome.write.loop):
        told = list(group)
        if not loop.is_closed():  # else nobody waits any more
            loop.call_soon_threadsafe(_resolve, told)


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    for write, result in outcomes:
        if write.future.done():
            continue
        if isinstance(result, Exception):
            write.future.set_exception(result)
        else:
            write.future.set_result(result)


def _engine(url: str) -> tuple[URL, Engine]:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise errors.FailedPrecondition(
                f"--database {url}: a database in memory keeps nothing.", remedy="Name a file: sqlite:///PATH."
            )
        # Its errors would quote what people said, and errors are logged.
        return parsed, create_engine(parsed, pool_size=READERS + 3, hide_parameters=True)
    except (ArgumentError, ImportError) as error:
        raise errors.FailedPrecondition(
            f"--database: {error}.",
            remedy="Give an SQLAlchemy URL, such as sqlite:///PATH, and install the driver that it names.",
        ) from error


def migrate(connection: Connection, *, down_to: str = "") -> None:
    """Brings the schema to the newest version, or back to an older one, in one transaction; "base" is an empty one.

    Raises `errors.FailedPrecondition`.
    """
    config = Config()
    config.set_main_option("script_location", _MIGRATIONS.as_posix().replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        with sqlite.whole(connection), connection.begin():
            if down_to:
                alembic.command.downgrade(config, down_to)
            else:
                alembic.command.upgrade(config, "head")
    except CommandError as error:
        raise errors.FailedPrecondition(
            f"The database's schema is not one that this version knows: {error}.",
            remedy="Run the version of Thumbwheel that wrote it, or a later one.",
        ) from error
