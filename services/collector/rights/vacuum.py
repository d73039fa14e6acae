"""Getting what was deleted off the disk: pages that no row uses still hold what they held.

SQLite, for the record and for the inbox: the write-ahead log is emptied into the file, the file is written anew without
its free pages, and the log that this took is emptied in turn. PostgreSQL: the tables are written anew; its own
write-ahead log is recycled in time.
"""

from __future__ import annotations

import time
from typing import Any

from services.collector.tables import DOOR
from thumbwheel import errors

WITH_CONTENT = {"": ("feedback_generations", "feedback", "generations", "outbox"), DOOR: (f"{DOOR}.inbox",)}
_READERS_SECONDS = 60.0
_LOOK_AGAIN_SECONDS = 0.02


def vacuum(connection: Any, *, dialect: str, schema: str = "") -> None:
    """Rewrites the record, or what `schema` names, without what was deleted; `connection` is the driver's, in no
    transaction.

    Raises `errors.DeadlineExceeded` where a reader does not let go of what it looks at.
    """
    if dialect == "sqlite":
        _empty_log(connection, schema or "main")
        connection.execute(f"VACUUM {schema or 'main'}").close()
        _empty_log(connection, schema or "main")
        return
    for name in WITH_CONTENT[schema]:
        connection.execute(f"VACUUM (FULL) {name}")


def _empty_log(connection: Any, schema: str) -> None:
    """Copies the write-ahead log into the database and cuts it to nothing, once no reader needs it."""
    deadline = time.monotonic() + _READERS_SECONDS
    while True:
        busy, _, _ = connection.execute(f"PRAGMA {schema}.wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return
        if time.monotonic() > deadline:
            raise errors.DeadlineExceeded(
                f"The database's log could not be emptied within {_READERS_SECONDS:g} s: it is being read.",
                remedy="End long reads of the database, such as backups; it is tried again.",
            )
        time.sleep(_LOOK_AGAIN_SECONDS)
