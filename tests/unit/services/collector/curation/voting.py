"""Votes of a prompt with few words, for tests."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Any

from services.collector.curation import Choice, RaterId, Response, Vote

_numbers = count()


def response(name: str, **properties: Any) -> Response:
    """The response of this name: its generation id, and its text."""
    return Response(name, hashlib.sha256(name.encode()).digest(), **properties)


def compare(user: str, winner: str, loser: str, **properties: Any) -> Vote:
    """A comparison that `winner` won, having been shown first."""
    return _vote(user, Choice.A, response(winner), response(loser), **properties)


def thumb(user: str, name: str, *, up: bool, **properties: Any) -> Vote:
    """A thumb."""
    return _vote(user, Choice.UP if up else Choice.DOWN, response(name), None, **properties)


def _vote(user: str, choice: Choice, a: Response, b: Response | None, **properties: Any) -> Vote:
    number = next(_numbers)
    fields: dict[str, Any] = {
        "feedback_id": f"f{number:06}",
        "rater": RaterId("acme", user),
        "prompt_id": "prompt",
        "choice": choice,
        "a": a,
        "received_at": number,
        "b": b,
    }
    return Vote(**fields | properties)
