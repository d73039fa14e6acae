"""The reference policy's response to a prompt: asked for once, and kept with the prompt.

The baseline of ChatGLM-RLHF (Hou et al., 2024, arXiv 2404.00934): r(x, y) − r(x, y_ref), with one y_ref ~ π₀ for each
prompt. Responses are kept on disk, beyond any reward version; what a version says of them, in memory, for as long as it
is live.

On disk each is sealed with a key that its prompt gives, and the prompt is not there. So whoever erases a prompt
wherever it is kept has erased the response too: only who asks that very prompt again can read it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from prometheus_client import Counter

from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import Prompt

logger = logging.getLogger(__name__)

LOOKUPS = Counter("thumbwheel_reward_reference_total", "Reference responses looked up, by how that ended.", ["outcome"])
_SCHEMA = "CREATE TABLE IF NOT EXISTS sealed (name BLOB PRIMARY KEY, response BLOB NOT NULL, used REAL NOT NULL)"
_NONCE_BYTES = 12

KEPT_SECONDS = 14 * 86_400.0
"""What nobody asks for goes after so long, as it does from the stream: a prompt may be short enough to be guessed."""

Tokens = tuple[int, ...]
"""Token ids of a prompt and a reference response to it."""

Ask = Callable[[Prompt], Awaitable[str]]
"""Asks the reference policy. Raises our errors."""


class _Seal(NamedTuple):
    """What a prompt's response lies under, and what it is read with; neither tells the other, or the prompt."""

    name: bytes
    cipher: AESGCM

    @classmethod
    def of(cls, version: str, prompt: Prompt) -> Self:
        """Of a prompt, as one reference version answers it."""
        asked = version.encode() + b"\0" + prompt.SerializeToString(deterministic=True)
        return cls(hashlib.sha256(b"name\0" + asked).digest(), AESGCM(hashlib.sha256(b"key\0" + asked).digest()))

    def closed(self, response: str) -> bytes:
        """The response, sealed."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self.cipher.encrypt(nonce, response.encode(), self.name)

    def opened(self, sealed: bytes) -> str:
        """The response. Raises `InvalidTag`, or `ValueError`, where a byte of it was changed."""
        return self.cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self.name).decode()


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
        self._database.execute("DROP TABLE IF EXISTS reference")  # a release before kept responses readable
        self._database.execute(_SCHEMA)
        self._drop()
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def response(self, prompt: Prompt) -> str:
        """The response to a prompt; "" where none is known and none can be had now. Calls for one prompt that come
        together ask once.
        """
        if self._ask is None:
            return ""
        seal = _Seal.of(self._version, prompt)
        if known := self._known(seal):
            LOOKUPS.labels("kept").inc()
            return known
        if seal.name not in self._asked:
            task = asyncio.ensure_future(self._fetch(seal, prompt, self._ask))
            self._asked[seal.name] = task
            task.add_done_callback(lambda _: self._asked.pop(seal.name, None))
        try:
            # Shielded: others may wait for the same.
            found = await asyncio.shield(self._asked[seal.name])
        except errors.ThumbwheelError as error:
            LOOKUPS.labels("failed").inc()
            logger.warning("scored without a reference", extra={"error": str(error)})
            return ""
        LOOKUPS.labels("asked").inc()
        return found

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()

    def _known(self, seal: _Seal) -> str:
        row = self._database.execute("SELECT response FROM sealed WHERE name = ?", (seal.name,)).fetchone()
        if row is None:
            return ""
        try:
            response = seal.opened(row[0])
        except (InvalidTag, ValueError):
            logger.warning("a kept reference is damaged, and is asked for again")
            return ""
        self._database.execute("UPDATE sealed SET used = ? WHERE name = ?", (time.time(), seal.name))
        return response

    async def _fetch(self, seal: _Seal, prompt: Prompt, ask: Ask) -> str:
        response = await ask(prompt)
        if response:
            row = (seal.name, seal.closed(response), time.time())
            self._database.execute("INSERT OR REPLACE INTO sealed VALUES (?, ?, ?)", row)
            self._drop()
        return response

    def _drop(self) -> None:
        """Drops what was not asked for in a long time, and what is too much."""
        self._database.execute("DELETE FROM sealed WHERE used < ?", (time.time() - KEPT_SECONDS,))
        self._database.execute(
            "DELETE FROM sealed WHERE name IN (SELECT name FROM sealed ORDER BY used DESC LIMIT -1 OFFSET ?)",
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
