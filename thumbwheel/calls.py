"""What is known of the call being handled: who calls, and until when an answer is of use.

Set by the server for the task that handles a call, and inherited by the tasks it starts. The client reads the deadline,
so that a call made on behalf of another never outlasts it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from thumbwheel import errors

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest request or response, of servers and clients alike."""

DEFAULT_TENANT = "default"
TENANT_KEY = "thumbwheel-tenant"


@dataclass(frozen=True)
class Caller:
    """Who calls: the tenant, and the API key used, "" where none is needed."""

    tenant: str
    key_id: str = ""


_CALLER: ContextVar[Caller | None] = ContextVar("thumbwheel_caller", default=None)
_DEADLINE: ContextVar[float | None] = ContextVar("thumbwheel_deadline", default=None)


def enter(caller: Caller, remaining: float | None) -> None:
    """Says who calls and how many seconds are left, for the rest of the current task."""
    _CALLER.set(caller)
    _DEADLINE.set(None if remaining is None else time.monotonic() + remaining)


def caller() -> Caller | None:
    """Who calls; None outside of a call."""
    return _CALLER.get()


def remaining() -> float | None:
    """Seconds until the caller gives up, 0 at least; None outside of a call, or where it waits for ever."""
    deadline = _DEADLINE.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def bounded(timeout: float) -> float:
    """The shorter of `timeout` and what the call being handled has left. Raises `errors.DeadlineExceeded` at 0."""
    left = remaining()
    if left is None:
        return timeout
    if left == 0.0:
        raise errors.DeadlineExceeded("The call on whose behalf this one is made is over its deadline.")
    return min(timeout, left)
