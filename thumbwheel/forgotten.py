"""What forgotten names become: hashes, by which a record of theirs is known that comes late, or lies elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping

from thumbwheel.v1.events_pb2 import GenerationEvent


def user_hash(tenant: str, user_id: str) -> bytes:
    """SHA-256 of a user: 32 bytes."""
    return _hash("user", tenant, user_id)


def prompt_hash(tenant: str, prompt_id: str) -> bytes:
    """SHA-256 of a prompt's id: 32 bytes."""
    return _hash("prompt", tenant, prompt_id)


def is_forgotten(event: GenerationEvent, hashes: Container[bytes]) -> bool:
    """Whether a generation is of a forgotten user, or names none and answers a prompt that went with one."""
    if user_hash(event.tenant, event.user_id) in hashes:
        return True
    return not event.user_id and prompt_hash(event.tenant, event.generation.prompt_id) in hashes


def is_expired(event: GenerationEvent, finished_before: Mapping[str, int]) -> bool:
    """Whether a generation is older than its tenant lets it be kept: by tenant, "" for every other one, microseconds
    since the epoch.
    """
    before = finished_before.get(event.tenant, finished_before.get("", 0))
    return event.HasField("finished_at") and event.finished_at.ToMicroseconds() < before


def _hash(kind: str, tenant: str, id: str) -> bytes:
    # Ids hold no control characters, so that nothing can be moved across a separator.
    return hashlib.sha256(f"thumbwheel {kind}\0{tenant}\0{id}".encode()).digest()
