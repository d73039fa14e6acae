"""The database: SQLite on one machine, PostgreSQL beyond, and one way of writing for both.

    write ──▶ queue ──▶ writer thread: BEGIN · every write that waits · COMMIT ──▶ futures

One thread writes. While it waits for the disk, further writes queue up and share the next commit, so a commit's cost is
spread over all that came meanwhile, and nothing blocks the event loop. A future resolves after the commit: what it
brings is durable. Where a write raises, all are run again, each in a savepoint, so that it undoes itself alone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import alembic.command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.pool import ConnectionPoolEntry

from services.collector import metrics
from services.collector.faults import translate
from thumbwheel import errors

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], T]

BUSY_SECONDS = 5.0
MAX_WRITES = 128
READERS = 2
_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class _Write:
    """A write that waits for its turn."""

    work: Callable[..., Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    item: Any = None
    """What `work` is called with, together with those of its neighbours of the same work; None: it takes none."""

    alone: bool = False
    """Not in a transaction, and not beside any other write."""

    queued_at: float = field(default_factory=time.perf_counter)


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

    async def write_with_others(self, work: Callable[[Connection, Sequence[Any]], Sequence[Any]], item: Any) -> Any:
        """As `write`, for work that does many things as cheaply as one: it is called once for the items that wait side
        by side, and returns of each, in order, what it came to, or the `errors.ThumbwheelError` that is raised here.

        An item that comes to an error must have written nothing.
        """
        self._admit()
        result = await self._wait(self._enqueue(work, item=item))
        if isinstance(result, errors.ThumbwheelError):
            raise result
        return result

    async def maintain(self, work: Callable[[Any], T]) -> T:
        """Runs `work` on the driver's own connection, in no transaction, while nothing else writes, and returns what it
        returned: for what a database does only there, such as VACUUM. Has no deadline but those that `work` keeps.

        Raises what `work` raised, and as `write` does.
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
            with self._engine.connect().execution_options(reads=True) as connection, connection.begin():
                return work(connection)
        except DBAPIError as error:
            raise self._translate(error) from error

    def snapshot(self, work: Callable[[Connection], Iterator[T]]) -> Iterator[T]:
        """What `work` yields, all of it from one moment, while writes go on. For long reads, in the caller's thread."""
        level = "SERIALIZABLE" if self.dialect == "sqlite" else "REPEATABLE READ"
        try:
            with self._engine.connect() as plain:
                connection = plain.execution_options(reads=True, isolation_level=level)
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
        if self._closed:
            raise errors.Unavailable("The collector is stopping.", remedy="Send it again.")
        if self._queue.qsize() >= self._max_pending:
            raise errors.ResourceExhausted(
                f"{self._max_pending} writes wait for the database.",
                retry_after=1.0,
                remedy="Send it again in a second, with the same key.",
            )

    def _enqueue(self, work: Callable[..., T], *, item: Any = None, alone: bool = False) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Write(work, loop, future, item, alone))
        return future

    async def _wait(self, future: asyncio.Future[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"The database took longer than {self._timeout:g} s.",
                remedy="Send it again with the same key; see whether the disk is overloaded.",
            ) from None

    def _translate(self, error: DBAPIError | OSError) -> errors.ThumbwheelError:
        return translate(error, self._url)

    def _prepare_sqlite(self) -> None:
        if self._url.database:
            try:
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._translate(error) from error
        event.listen(self._engine, "connect", _configure_sqlite)
        event.listen(self._engine, "begin", _begin_sqlite)

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
        connection: Any = self._connection.connection.driver_connection
        try:
            if self.dialect != "sqlite":  # there, `_configure_sqlite` has seen to it
                connection.autocommit = True
            try:
                return _Outcome(task, task.work(connection))
            finally:
                if self.dialect != "sqlite":
                    connection.autocommit = False
        except Exception as error:  # noqa: BLE001  # it goes to the caller, whatever it is
            if isinstance(error, self._engine.dialect.loaded_dbapi.Error):
                error = self._translate(DBAPIError("maintenance", None, error))
            return _Outcome(task, error)

    def _commit(self, batch: Sequence[_Write], *, again: bool = True) -> list[_Outcome]:
        """Makes the batch durable in one transaction; where that fails, each write in one of its own."""
        try:
            outcomes = self._transact(batch)
        except DBAPIError as error:
            # A key that exists by now: another collector on this database was faster. Run again, the write sees it.
            clash = isinstance(error, IntegrityError)
            if len(batch) > 1 or (clash and again):
                return [outcome for write in batch for outcome in self._commit([write], again=len(batch) > 1)]
            outcomes = [_Outcome(write, error if clash else self._translate(error)) for write in batch]
        if batch:
            metrics.COMMIT_WRITES.observe(len(batch))
        now = time.perf_counter()
        for outcome in outcomes:
            metrics.COMMIT_SECONDS.observe(now - outcome.write.queued_at)
        return outcomes

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
            for (work, together), of_work in groupby(batch, key=lambda write: (write.work, write.item is not None)):
                writes = list(of_work)
                if together:
                    results = work(self._connection, [write.item for write in writes])
                    outcomes += map(_Outcome, writes, results)
                else:
                    outcomes += [_Outcome(write, work(self._connection)) for write in writes]
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
        return parsed, create_engine(parsed, pool_size=READERS + 2, hide_parameters=True)
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
        with connection.begin():
            if down_to:
                alembic.command.downgrade(config, down_to)
            else:
                alembic.command.upgrade(config, "head")
    except CommandError as error:
        raise errors.FailedPrecondition(
            f"The database's schema is not one that this version knows: {error}.",
            remedy="Run the version of Thumbwheel that wrote it, or a later one.",
        ) from error


def _configure_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver's own transactions break savepoints: `_begin_sqlite` starts them
    for pragma in (
        f"busy_timeout={int(BUSY_SECONDS * 1000)}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",  # what is deleted is overwritten, not only let go of
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE: a writer waits for its turn at the start, where waiting is possible, and not in the middle.
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
