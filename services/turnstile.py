"""Many calls at once, or one swap."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager


class Turnstile:
    """Keeps calls that are inside apart from swaps: a call sees one version from beginning to end.

    A waiting swap goes before calls that come after it, so that steady traffic cannot starve it.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._swaps = 0
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Holds off swaps while inside."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._swaps == 0)
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def swap(self, timeout: float, waiting: AbstractContextManager[None]) -> AsyncIterator[None]:
        """Waits for the calls inside to end, within `waiting`, then keeps others out. Raises `TimeoutError`."""
        self._swaps += 1
        try:
            with waiting:
                async with asyncio.timeout(timeout), self._changed:
                    await self._changed.wait_for(lambda: self._inside == 0)
            yield
        finally:
            self._swaps -= 1
            async with self._changed:
                self._changed.notify_all()
