"""Following the `versions` topic: the newest stable version of a role goes live.

A version is verified while serving goes on. One that does not verify is refused and counted; the next is awaited.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from prometheus_client import Counter

from services.engine import Engine
from thumbwheel import errors
from thumbwheel.checkpoints.store import LocalStore, VerifiedVersion
from thumbwheel.stream import deadletter, topics
from thumbwheel.stream.aio import records
from thumbwheel.stream.log import Log
from thumbwheel.v1.events_pb2 import VersionEvent
from thumbwheel.v1.policy_pb2 import SwapOutcome
from thumbwheel.v1.rollout_pb2 import ModelRole, VersionState

logger = logging.getLogger(__name__)

REFUSED = Counter("thumbwheel_versions_refused_total", "Announced versions that did not verify.")


def newest_verified(store: LocalStore, role: ModelRole.ValueType, *, process: str) -> VerifiedVersion:
    """The newest version that verifies; those that do not are logged. Raises `errors.MissingModel`."""
    for manifest in store.versions(role):
        try:
            return store.load(manifest.version)
        except errors.CorruptCheckpoint as error:
            REFUSED.inc()
            logger.error("%s is not served: %s", manifest.version, error)
    raise errors.MissingModel(
        f"{process} has no model to serve in {store.root}.",
        remedy="Type `thumbwheel up`, or `python -m trainer --init-only`.",
    )


class Follower:
    """Swaps `engine` to each newer stable version of `role`. `run` is a background task."""

    def __init__(self, *, log: Log, store: LocalStore, engine: Engine, role: ModelRole.ValueType, process: str) -> None:
        self._log, self._store, self._engine, self._role, self._process = log, store, engine, role, process

    async def run(self) -> None:
        """Follows for ever, from the oldest record: what is live already is passed over."""
        producer = self._log.producer()
        consumer = self._log.consumer([topics.VERSIONS], group=f"{self._process}-versions")
        try:
            async for batch in records(consumer):
                events = []
                for record in batch:
                    try:
                        events.append(deadletter.decode(VersionEvent, record))
                    except errors.ThumbwheelError as error:
                        await deadletter.bury(producer, record, reason=str(error), consumer=self._process)
                for event in self._newer(events):
                    if await self._go_live(event):
                        break
        finally:
            await asyncio.to_thread(producer.close, 5.0)

    def _newer(self, events: Sequence[VersionEvent]) -> list[VersionEvent]:
        """Stable versions of our role that are newer than what is live, newest first."""
        live = self._engine.live.manifest.sequence
        stable = VersionState.VERSION_STATE_STABLE
        newer = [
            event for event in events if event.role == self._role and event.state == stable and event.sequence > live
        ]
        return sorted(newer, key=lambda event: event.sequence, reverse=True)

    async def _go_live(self, event: VersionEvent) -> bool:
        try:
            target = await asyncio.to_thread(self._store.load, event.version)
        except errors.CorruptCheckpoint as error:
            REFUSED.inc()
            logger.error("%s is refused, serving goes on with %s: %s", event.version, self._engine.version, error)
            return False
        if event.manifest_sha256 != target.manifest_sha256:
            REFUSED.inc()
            logger.error("%s is refused: its manifest is not the one that was announced", event.version)
            return False
        swap = await self._engine.swap(target)
        return swap.outcome == SwapOutcome.SWAP_OUTCOME_LIVE
