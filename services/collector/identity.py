"""Ids that follow from what they name: the same record, replayed, gives the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from uuid_utils import uuid7

from services.collector.outbox import now_micros

_RANDOM_BITS = 80


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the collector itself adds to feedback: all that cannot be derived from what was sent."""

    feedback_id: str
    """UUIDv7."""

    micros: int
    """Microseconds since the epoch."""

    @classmethod
    def now(cls) -> Arrival:
        """Here and now."""
        return cls(str(uuid7()), now_micros())


def derived(feedback_id: str, *meaning: object) -> str:
    """A UUIDv7-shaped id: the time of the feedback that it derives from, and a digest of that id and its meaning."""
    text = "\n".join([feedback_id, *map(str, meaning)])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[: _RANDOM_BITS // 8], "big")
    number = (int(feedback_id.replace("-", ""), 16) >> _RANDOM_BITS << _RANDOM_BITS) | digest
    number = number & ~(0xF << 76) | (7 << 76)  # version
    number = number & ~(0x3 << 62) | (2 << 62)  # variant
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def item_of(kind: str, generation_ids: Iterable[str]) -> bytes:
    """What a judgement is about, whichever response was shown first: 32 bytes."""
    return hashlib.sha256("\n".join([kind, *sorted(generation_ids)]).encode()).digest()


def outcome_of(item: bytes, judgement: bytes) -> bytes:
    """Which way an item was judged: 32 bytes."""
    return hashlib.sha256(item + judgement).digest()
