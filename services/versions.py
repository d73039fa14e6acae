"""Following the `versions` topic: the newest stable version of a role goes live, and one that is rolled back goes away.

A version is brought to the local disk and verified while serving goes on. One that does not verify is refused and
counted, and the next best is taken; one that cannot be had now, since the store is away, is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from prometheus_client import Counter, Histogram

from services.engine import Engine
from services.swap import step
from thumbwheel import errors, tracing
from thumbwheel.checkpoints.held import HeldVersions
from thumbwheel.checkpoints.store import LocalStore, VerifiedVersion
from thumbwheel.stream import deadletter, topics
from thumbwheel.stream.aio import records
from thumbwheel.stream.log import Log
from thumbwheel.v1.events_pb2 import VersionEvent
from thumbwheel.v1.policy_pb2 import SwapOutcome
from thumbwheel.v1.rollout_pb2 import ModelRole, VersionState

logger = logging.getLogger(__name__)

REFUSED = Counter("thumbwheel_versions_refused_total", "Announced versions that did not verify.")
CLICK_TO_LIVE = Histogram(
    "thumbwheel_click_to_live_seconds",
    "Time from the commit of feedback until this server has served a version that learnt from it.",
    ["role"],
    buckets=(1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200),
)
DEFERRED = Counter("thumbwheel_versions_deferred_total", "Tries of announced versions that could not be had then.")

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 30.0

_WITHDRAWN = (VersionState.VERSION_STATE_ROLLED_BACK, VersionState.VERSION_STATE_REFUSED)


def newest_verified(
    store: LocalStore, held: HeldVersions, role: ModelRole.ValueType, *, process: str, timeout: float
) -> VerifiedVersion:
    """The newest version that verifies, on the local disk: from the store, or where that is away or empty, one that an
    earlier process has left here. Those that do not verify are logged. Raises `errors.MissingModel`.
    """
    from_store = [manifest.version for manifest in store.versions(role) if not store.is_thin(manifest.version)]
    tries = [(version, True) for version in from_store] + [(version, False) for version in held.left_here()]
    for version, in_store in tries:
        try:
            return held.fetch(version, timeout=timeout) if in_store else held.load(version)
        except (errors.CorruptCheckpoint, errors.Unavailable, errors.DeadlineExceeded) as error:
            REFUSED.inc()
            logger.error("%s is not served: %s", version, error)
    raise errors.MissingModel(
        f"{process} has no model to serve in {store.root}.",
        remedy="Type `thumbwheel up`, or `python -m trainer --init-only`.",
    )


def pinned(held: HeldVersions, role: ModelRole.ValueType, version: str, *, timeout: float) -> VerifiedVersion:
    """The one version that a server is to serve for good. Raises `errors.InvalidArgument` for one of another role, and
    what `HeldVersions.fetch` raises.
    """
    found = held.fetch(version, timeout=timeout)
    if found.manifest.role != role:
        raise errors.InvalidArgument(
            f"is {version}, which is for another role.", field="serve_version", remedy="See `thumbwheel versions`."
        )
    return found


class Follower:
    """Swaps `engine` to the version of `role` that is to be served. `run` is a background task."""

    def __init__(
        self,
        *,
        log: Log,
        held: HeldVersions,
        engine: Engine,
        role: ModelRole.ValueType,
        process: str,
        fetch_seconds: float,
    ) -> None:
        self._log, self._held, self._engine, self._role, self._process = log, held, engine, role, process
        self._fetch_seconds = fetch_seconds
        self._click_to_live = CLICK_TO_LIVE.labels(ModelRole.Name(role).removeprefix("MODEL_ROLE_").lower())
        self._standing: dict[str, VersionEvent] = {}
        self._settled: set[str] = set()
        self._traces: dict[str, str] = {}
        self._learnt_at: dict[int, list[float]] = {}  # by sequence, of what is not live yet
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follows for ever, from the oldest record: what is live already is passed over."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._act())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _read(self) -> None:
        producer = self._log.producer()
        consumer = self._log.consumer([topics.VERSIONS], group=f"{self._process}-versions")
        try:
            async for batch in records(consumer):
                for record in batch:
                    try:
                        event = deadletter.decode(VersionEvent, record)
                    except errors.ThumbwheelError as error:
                        await deadletter.bury(producer, record, reason=str(error), consumer=self._process)
                        continue
                    if event.role == self._role:
                        self._note(event, tracing.of_record(record.headers))
                self._changed.set()
        finally:
            await asyncio.to_thread(producer.close, 5.0)

    def _note(self, event: VersionEvent, traceparent: str) -> None:
        self._standing[event.version] = event
        if traceparent:
            self._traces[event.event_id] = traceparent
        if event.learnt_received_at and event.sequence > self._engine.live.manifest.sequence:
            self._learnt_at[event.sequence] = [at.ToMicroseconds() / 1e6 for at in event.learnt_received_at]

    async def _act(self) -> None:
        """Takes on what is wanted. What cannot be had now is passed over and tried again, sooner if there is news."""
        delay = FIRST_RETRY_SECONDS
        while True:
            await self._changed.wait()
            self._changed.clear()
            away: set[str] = set()
            try:
                while (event := self.wanted(without=away)) is not None:
                    try:
                        with tracing.span(
                            "version", parent=self._traces.get(event.event_id, ""), version=event.version
                        ):
                            await self._go_live(event)
                    except (errors.Unavailable, errors.DeadlineExceeded, errors.NoSpace) as error:
                        away.add(event.event_id)
                        self._defer(error)
                if self._forsaken():
                    await self._engine.rollback()
            except errors.Unavailable as error:
                self._defer(error)
            await asyncio.to_thread(self._tidy)
            if away or self._forsaken():
                asyncio.get_running_loop().call_later(delay, self._changed.set)
                delay = min(2 * delay, LAST_RETRY_SECONDS)
            else:
                delay = FIRST_RETRY_SECONDS

    def _defer(self, error: errors.ThumbwheelError) -> None:
        DEFERRED.inc()
        logger.warning("no swap now, it is tried again: %s", error, extra={"live": self._engine.version})

    def wanted(self, *, without: Collection[str] = ()) -> VersionEvent | None:
        """The version to serve in place of the one that is live: the newest stable one that is newer, or any stable one
        where the live one has been withdrawn, or does not reproduce its probe. Announcements whose ids are in `without`
        are passed over.
        """
        live = self._engine.live.manifest
        stable = [
            event
            for event in self._standing.values()
            if event.state == VersionState.VERSION_STATE_STABLE
            and event.event_id not in self._settled
            and event.event_id not in without
            and event.version != live.version
            and (event.sequence > live.sequence or self._withdrawn())
        ]
        return max(stable, key=lambda event: event.sequence, default=None)

    def _forsaken(self) -> bool:
        """The live version was withdrawn, nothing else is said to be stable (the records may be lost) or can be had,
        and what was served before is still here.
        """
        return self._withdrawn() and self._engine.previous is not None

    def _withdrawn(self) -> bool:
        event = self._standing.get(self._engine.version)
        return self._engine.suspect or (event is not None and event.state in _WITHDRAWN)

    async def _go_live(self, event: VersionEvent) -> None:
        """Brings a version here and swaps to it. One that is refused or rolled back is not tried again, unless it is
        announced again.
        """
        try:
            with step("fetch", version=event.version):
                target = await asyncio.to_thread(self._held.fetch, event.version, timeout=self._fetch_seconds)
        except (errors.CorruptCheckpoint, errors.InvalidArgument) as error:
            self._refuse(event, str(error))
            return
        if event.manifest_sha256 != target.manifest_sha256:
            self._refuse(event, "its manifest is not the one that was announced")
            return
        if self._standing[event.version] is not event:
            return  # there was news of it meanwhile
        swap = await self._engine.swap(target)
        if swap.outcome == SwapOutcome.SWAP_OUTCOME_LIVE:
            self._learnt_is_live(event.sequence)
        if swap.outcome == SwapOutcome.SWAP_OUTCOME_SUPERSEDED:
            self._settled.add(event.event_id)
        if swap.outcome in (SwapOutcome.SWAP_OUTCOME_REFUSED, SwapOutcome.SWAP_OUTCOME_ROLLED_BACK):
            self._refuse(event, swap.error)

    def _learnt_is_live(self, sequence: int) -> None:
        """What older versions learnt is live too: each version goes on from the one before."""
        for older in [one for one in self._learnt_at if one <= sequence]:
            for at in self._learnt_at.pop(older):
                self._click_to_live.observe(max(0.0, time.time() - at), tracing.exemplar())

    def _refuse(self, event: VersionEvent, why: str) -> None:
        self._settled.add(event.event_id)
        REFUSED.inc()
        logger.error("%s is refused, serving goes on with %s: %s", event.version, self._engine.version, why)

    def _tidy(self) -> None:
        keep = [version for version in (self._engine.live, self._engine.previous) if version is not None]
        self._held.keep_only({version.manifest.version for version in keep})
