"""What a database driver raises, as our own errors: the one boundary for it."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from thumbwheel import errors

_FULL_DISK_BYTES = 1 << 20
_SQLSTATE_DISK_FULL = "53100"


def require_open(*, closed: bool) -> None:
    """Raises where a queue for the database takes nothing any more."""
    if closed:
        raise errors.Unavailable("The collector is stopping.", remedy="Send it again.")


def require_room(waiting: int, most: int, what: str) -> None:
    """Raises where a queue for the database, of at most `most` of `what`, takes nothing more for now."""
    if waiting >= most:
        raise errors.ResourceExhausted(
            f"{most} {what} wait for the database.",
            retry_after=1.0,
            remedy="Send it again in a second, with the same key.",
        )


def too_long(seconds: float) -> errors.DeadlineExceeded:
    """What whoever has waited so long is told."""
    return errors.DeadlineExceeded(
        f"The database took longer than {seconds:g} s.",
        remedy="Send it again with the same key; see whether the disk is overloaded.",
    )


def translate(error: DBAPIError | OSError, url: URL) -> errors.ThumbwheelError:
    """The error to raise for a fault of the database at `url`."""
    where = url.render_as_string(hide_password=True) if url.get_backend_name() != "sqlite" else str(url.database)
    text = str(error.orig if isinstance(error, DBAPIError) else error)
    if _is_full(error, url):
        return errors.NoSpace(
            f"The collector cannot write to its database {where}: {text}.",
            remedy="Free space on that disk, then send it again with the same key; nothing was recorded.",
        )
    if isinstance(error, OSError) or _code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return errors.FailedPrecondition(
            f"The collector cannot open its database {where}: {text}.",
            remedy="Choose a folder it may write to with --home, or another database with --database.",
        )
    if _code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return errors.FailedPrecondition(
            f"The collector's database {where} is damaged: {text}.",
            remedy="Put back a backup, or move the file away to begin with an empty one.",
        )
    return errors.Unavailable(
        f"The collector's database {where} is not available: {text}.", remedy="Send it again with the same key."
    )


def _is_full(error: BaseException | None, url: URL) -> bool:
    """Looks along the chain: a failed clean-up hides the fault that it cleans up after."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.Error):
            code = error.sqlite_errorcode if hasattr(error, "sqlite_errorcode") else 0
            # A full disk also shows as an I/O error, where SQLite could not extend its shared-memory file.
            if code == sqlite3.SQLITE_FULL or (code & 0xFF == sqlite3.SQLITE_IOERR and _disk_is_full(url)):
                return True
        if getattr(error, "sqlstate", None) == _SQLSTATE_DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_is_full(url: URL) -> bool:
    try:
        return shutil.disk_usage(Path(url.database or ".").parent).free < _FULL_DISK_BYTES
    except OSError:
        return False


def _code(error: DBAPIError) -> int:
    code: int = getattr(error.orig, "sqlite_errorcode", 0)
    return code & 0xFF
