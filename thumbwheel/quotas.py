"""What one tenant may take: calls a second, and calls at once."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thumbwheel import errors

_REMEMBERED = 10_000


@dataclass
class _Tenant:
    tokens: float
    at: float
    running: int = 0


class Quotas:
    """A token bucket and a count for each tenant. For one event loop.

    `rate` is calls a second, with bursts of one second's worth, 1 at least; `at_once` is calls being handled. 0 is no
    limit.
    """

    def __init__(self, *, rate: float = 0.0, at_once: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._at_once, self._clock = rate, max(1.0, rate), at_once, clock
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()

    @contextlib.contextmanager
    def call(self, tenant: str) -> Iterator[None]:
        """One call of the tenant. Raises `errors.ResourceExhausted`, saying when to come again."""
        if not self._rate and not self._at_once:
            yield
            return
        state = self._state(tenant)
        if self._at_once and state.running >= self._at_once:
            raise errors.ResourceExhausted(
                f"Tenant {tenant!r} has {state.running} calls in flight, the most allowed.", retry_after=0.5
            )
        if self._rate:
            if state.tokens < 1.0:
                wait = (1.0 - state.tokens) / self._rate
                raise errors.ResourceExhausted(
                    f"Tenant {tenant!r} calls more than {self._rate:g} times a second.", retry_after=wait
                )
            state.tokens -= 1.0
        state.running += 1
        try:
            yield
        finally:
            state.running -= 1

    def _state(self, tenant: str) -> _Tenant:
        now = self._clock()
        state = self._tenants.get(tenant)
        if state is None:
            self._forget()
            state = self._tenants[tenant] = _Tenant(self._burst, now)
        self._tenants.move_to_end(tenant)
        state.tokens = min(self._burst, state.tokens + (now - state.at) * self._rate)
        state.at = now
        return state

    def _forget(self) -> None:
        """Bounds the memory that made-up tenants could take: idle ones go, the one longest away first."""
        while len(self._tenants) >= _REMEMBERED:
            idle = next((name for name, state in self._tenants.items() if state.running == 0), None)
            if idle is None:
                return
            del self._tenants[idle]
