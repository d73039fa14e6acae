"""How a background task meets a fault that passes: it waits, longer each time, and goes on."""

from __future__ import annotations

import asyncio
import random

from thumbwheel import errors

RETRIED = (errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted, errors.NoSpace)
"""Faults after which the same thing may succeed: a broker that is away, a database that is busy, a full disk."""

_FIRST_SECONDS = 0.05


class Pause:
    """Pauses that double up to `longest` seconds, each shortened by up to a half at random."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.seconds = min(_FIRST_SECONDS, longest)

    def reset(self) -> None:
        """It went well: the next pause is short again."""
        self.seconds = min(_FIRST_SECONDS, self._longest)

    async def wait(self) -> None:
        """Waits, and doubles the next pause."""
        await asyncio.sleep(self.seconds * random.uniform(0.5, 1.0))
        self.seconds = min(self.seconds * 2, self._longest)
