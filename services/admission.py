"""Who may come in: a call is taken while it can be expected to have its turn soon, and told to retry where not.

    slots free and room in the KV cache ──▶ in, at once
    else: expected wait = sequences that must end first × tokens of each ÷ tokens a second of the full engine
          wait ≤ max_queue_seconds and ≤ what the caller's deadline leaves ──▶ in, and queues
          else ──▶ RESOURCE_EXHAUSTED, with the wait

By Little's law: throughput is measured only while the engine is full, since an engine with little to do says nothing of
what it could do. Until it has been measured, one engine's worth of calls may queue. What a response will take is what
responses have taken of late, as a share of what they were allowed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import Counter, Gauge

from services.config import EngineSettings
from thumbwheel import calls, errors

SHED = Counter("thumbwheel_admission_shed_total", "Calls told to retry later, by why.", ["reason"])
EXPECTED_WAIT = Gauge("thumbwheel_admission_wait_seconds", "Wait that a call taken in now would be expected to have.")
RATE = Gauge("thumbwheel_admission_tokens_per_second", "Throughput of the full engine, as measured of late.")

_WINDOW_SECONDS = 1.0
_RATE_WEIGHT = 0.3
_SHARE_WEIGHT = 0.05
_LEAST_RETRY = 0.1


@dataclass
class Ticket:
    """A call that is in. `used` is set to the tokens that its response came to, where that is known."""

    used: int | None = None


class Admission:
    """Counts what is in, measures what the engine does, and turns away what would wait too long. For one event loop.

    `slots` sequences run at once, holding at most `kv_tokens` tokens (None: no such bound); beyond `most` sequences
    nothing is taken.
    """

    def __init__(
        self,
        *,
        slots: int,
        most: int,
        max_wait: float,
        kv_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._most, self._max_wait, self._kv_tokens = slots, most, max_wait, kv_tokens
        self._clock = clock
        self.in_flight = 0
        self._tokens = 0.0  # expected of all that is in
        self._share = 1.0  # of the tokens allowed, those that responses come to
        self._rate = 0.0
        self._full, self._at, self._is_full = 0.0, clock(), False  # seconds that the engine was full, until `_at`
        # `_full` where the present window began and where something was done last, and the tokens done between.
        self._window, self._last, self._done = 0.0, 0.0, 0.0

    @classmethod
    def of(cls, settings: EngineSettings, *, reserved: int = 0, kv_tokens: int | None = None) -> Admission:
        """As a service's settings say; `reserved` of the engine's slots are for others."""
        return cls(
            slots=max(1, settings.max_num_seqs - reserved),
            most=settings.max_in_flight,
            max_wait=settings.max_queue_seconds,
            kv_tokens=kv_tokens,
        )

    @contextlib.contextmanager
    def admit(self, *, prompt: int, allowed: int = 0, sequences: int = 1) -> Iterator[Ticket]:
        """One call of `sequences` sequences, with `prompt` tokens to read and up to `allowed` to write, in all.

        Raises `errors.ResourceExhausted`.
        """
        expected = prompt + allowed * self._share
        self._refuse(sequences, expected)
        self._measure()
        ticket, began, full_before = Ticket(), self._at, self._full
        self.in_flight += sequences
        self._tokens += expected
        self._measure()
        try:
            yield ticket
        finally:
            self._measure()
            self.in_flight -= sequences
            self._tokens = max(0.0, self._tokens - expected) if self.in_flight else 0.0
            if ticket.used is not None:
                # Of its tokens, those that were made while the engine was full.
                lasted = self._at - began
                self._done += (prompt + ticket.used) * ((self._full - full_before) / lasted if lasted > 0 else 0.0)
                self._last = self._full
                if allowed:
                    self._share += _SHARE_WEIGHT * (ticket.used / allowed - self._share)
            self._measure()

    def turn_away(self) -> None:
        """Raises `errors.ResourceExhausted` where even the smallest call would not be taken now. For before anything
        else is done with a call: what is turned away then costs next to nothing, and those who are in nothing.
        """
        self._refuse(1, 0.0)

    def expected_wait(self, sequences: int = 1, tokens: float = 0.0) -> float:
        """Seconds until these sequences would have their turn; infinite where that is not known and the queue long."""
        if self.in_flight == 0:
            return 0.0  # however large it is, it waits for nobody
        mean = self._tokens / self.in_flight or 1.0
        first = float(self.in_flight + sequences - self._slots)
        if self._kv_tokens is not None:
            first = max(first, (self._tokens + tokens - self._kv_tokens) / mean)
        if first <= 0:
            return 0.0
        if not self._rate:
            return 0.0 if self.in_flight < 2 * self._slots else math.inf
        return first * mean / self._rate

    def _refuse(self, sequences: int, tokens: float) -> None:
        if self.in_flight + sequences > self._most:
            SHED.labels("in_flight").inc()
            raise errors.ResourceExhausted(
                f"{self.in_flight} requests are in flight, and {self._most} the most allowed.", retry_after=1.0
            )
        wait = self.expected_wait(sequences, tokens)
        EXPECTED_WAIT.set(min(wait, 1e6))
        if wait > self._max_wait:
            SHED.labels("queue").inc()
            retry = min(max(wait - self._max_wait, _LEAST_RETRY), 30.0) if math.isfinite(wait) else 1.0
            raise errors.ResourceExhausted(
                f"The queue is too long: {self.in_flight} requests are in flight.", retry_after=retry
            )
        left = calls.remaining()
        if left is not None and wait > left:
            SHED.labels("deadline").inc()
            raise errors.ResourceExhausted(
                f"It would have its turn in about {wait:.1f} s, after its deadline in {left:.1f} s.", retry_after=wait
            )

    def _measure(self) -> None:
        """Closes the window where it has enough to say, and counts the time since the last change."""
        now = self._clock()
        # Many may end in one instant, so a window ends with the instant, not within it.
        if now > self._at and (seconds := self._last - self._window) >= _WINDOW_SECONDS and self._done:
            rate = self._done / seconds
            self._rate = rate if not self._rate else self._rate + _RATE_WEIGHT * (rate - self._rate)
            RATE.set(self._rate)
            self._window, self._done = self._last, 0.0
        if self._is_full:
            self._full += now - self._at
        self._at, self._is_full = now, self.in_flight >= self._slots
