"""The reference policy's response to a prompt: asked for once, and kept with the prompt.

The baseline of ChatGLM-RLHF (Hou et al., 2024, arXiv 2404.00934): r(x, y) − r(x, y_ref), with one y_ref ~ π₀ for each
prompt. Responses are kept on disk, beyond any reward version; what a version says of them, in memory, for as long as it
is live.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

from prometheus_client import Counter

from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import Prompt

logger = logging.getLogger(__name__)

LOOKUPS = Counter("thumbwheel_reward_reference_total", "Reference responses looked up, by how that ended.", ["outcome"])
_SCHEMA = "CREATE TABLE IF NOT EXISTS reference (key BLOB PRIMARY KEY, response TEXT NOT NULL, used REAL NOT NULL)"

KEPT_SECONDS = 14 * 86_400.0
"""What nobody asks for goes after so long, as it does from the stream: it may answer somebody who is forgotten."""

Tokens = tuple[int, ...]
"""Token ids of a prompt and a reference response to it."""

Ask = Callable[[Prompt], Awaitable[str]]
"""Asks the reference policy. Raises our errors."""


class References:
    """Reference responses, by prompt. `ask` is None where nobody can be asked: then none is known."""

    def __init__(self, path: Path, ask: Ask | None, *, version: str, capacity: int) -> None:
        self._ask, self._version, self._capacity = ask, version, capacity
        self._asked: dict[bytes, asyncio.Future[str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")  # what is lost is asked for again
        self._database.execute("PRAGMA secure_delete=ON")  # what is dropped is overwritten
        self._database.execute(_SCHEMA)
        self._drop()

    async def response(self, prompt: Prompt) -> str:
        """The response to a prompt; "" where none is known and none can be had now. Calls for one prompt that come
        together ask once.
        """
        if self._ask is None:
            return ""
        key = hashlib.sha256(self._version.encode() + b"\0" + prompt.SerializeToString(deterministic=True)).digest()
        if known := self._known(key):
            LOOKUPS.labels("kept").inc()
            return known
        if key not in self._asked:
            task = asyncio.ensure_future(self._fetch(key, prompt, self._ask))
            self._asked[key] = task
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        try:
            # Shielded: others may wait for the same.
            found = await asyncio.shield(self._asked[key])
        except errors.ThumbwheelError as error:
            LOOKUPS.labels("failed").inc()
            logger.warning("scored without a reference", extra={"error": str(error)})
            return ""
        LOOKUPS.labels("asked").inc()
        return found

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()

    def _known(self, key: bytes) -> str:
        row = self._database.execute("SELECT response FROM reference WHERE key = ?", (key,)).fetchone()
        if row is None:
            return ""
        self._database.execute("UPDATE reference SET used = ? WHERE key = ?", (time.time(), key))
        return str(row[0])

    async def _fetch(self, key: bytes, prompt: Prompt, ask: Ask) -> str:
        response = await ask(prompt)
        if response:
            self._database.execute("INSERT OR REPLACE INTO reference VALUES (?, ?, ?)", (key, response, time.time()))
            self._drop()
        return response

    def _drop(self) -> None:
        """Drops what was not asked for in a long time, and what is too much."""
        self._database.execute("DELETE FROM reference WHERE used < ?", (time.time() - KEPT_SECONDS,))
        self._database.execute(
            "DELETE FROM reference WHERE key IN (SELECT key FROM reference ORDER BY used DESC LIMIT -1 OFFSET ?)",
            (self._capacity,),
        )


class Baselines:
    """What all heads of the live version say of reference responses. Those asked for longest ago are dropped."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._version = ""
        self._values: OrderedDict[bytes, Sequence[float]] = OrderedDict()

    def known(self, version: str, references: Collection[Tokens]) -> dict[Tokens, Sequence[float]]:
        """[K] values of each of these that the version has scored already."""
        if version != self._version:
            return {}
        found = {}
        for reference in references:
            if (values := self._values.get(key := _key(reference))) is not None:
                self._values.move_to_end(key)
                found[reference] = values
        return found

    def keep(self, version: str, scored: Mapping[Tokens, Sequence[float]]) -> None:
        """Keeps what the version said; forgets what others did."""
        if version != self._version:
            self._values.clear()
            self._version = version
        self._values.update((_key(reference), values) for reference, values in scored.items())
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)


def _key(tokens: Tokens) -> bytes:
    return hashlib.sha256(array("I", tokens).tobytes()).digest()
