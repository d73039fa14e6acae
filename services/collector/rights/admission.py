"""Which generations of the stream are kept, and what their users agreed to."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from services.collector.outbox import now_micros
from services.collector.rights import tombstones
from services.collector.rights.tenants import Tenants
from thumbwheel.v1.events_pb2 import GenerationEvent


def admitted(connection: Connection, events: Sequence[GenerationEvent], tenants: Tenants) -> list[GenerationEvent]:
    """The generations that may be kept: not those of forgotten users, nor those past retention, which a stream read
    anew would bring back. One that may not be learnt from, by the rules as they are now, says so.
    """
    now, kept = now_micros(), []
    for event in tombstones.admitted(connection, events):
        rules = tenants[event.tenant]
        if event.HasField("finished_at") and event.finished_at.ToMicroseconds() < rules.expired_before(now):
            continue
        if not rules.consents(event.consent if event.HasField("consent") else None):
            event.consent = False
        kept.append(event)
    return kept
