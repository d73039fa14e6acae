"""How much memory the whole deployment takes at its peak."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil

_INTERVAL_SECONDS = 2.0


@dataclass
class Peak:
    """The largest sum seen."""

    bytes: int = 0


def proportional_set_size() -> int:
    """Bytes of this process and all its descendants; pages shared by n processes count 1/n in each."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we were counting
            total += process.memory_full_info().pss
    return total


@contextlib.asynccontextmanager
async def peak() -> AsyncIterator[Peak]:
    """Samples in the background; the peak is complete when the block is left."""
    seen = Peak()

    async def watch() -> None:
        while True:
            seen.bytes = max(seen.bytes, await asyncio.to_thread(proportional_set_size))
            await asyncio.sleep(_INTERVAL_SECONDS)

    watching = asyncio.create_task(watch(), name="memory")
    try:
        yield seen
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
