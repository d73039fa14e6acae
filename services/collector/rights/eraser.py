"""The background task that finishes erasures and erases what is too old.

Forget ──▶ erased in the database ──▶ wake ──▶ 1. exported files  2. vacuum  3. what policy servers keep of it
                                               4. the erasure is finished ──▶ answer
now and then ▶ content past its tenant's retention, by the same code

An erasure that a crash interrupts is finished at the next start: its row says so. A policy server that is away holds up
only the answer about users of whom it may keep something.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection, select, update

from services.collector import inbox, metrics, tables
from services.collector.clerk import Clerk
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.outbox import now_micros
from services.collector.pause import RETRIED, Pause
from services.collector.rights import copies, erasure, tombstones
from services.collector.rights.lineage import versions_that_learnt
from services.collector.rights.spools import Spools
from services.collector.rights.tenants import Tenants
from services.collector.rights.vacuum import vacuum
from thumbwheel import errors
from thumbwheel.forgotten import user_hash
from thumbwheel.v1.preference_pb2 import ForgetResponse

logger = logging.getLogger(__name__)

EXPIRE_AT_ONCE = 500
_HOUR = 3600.0


class Eraser:
    """Forgets users and enforces retention. `committed` is called after each commit that is to be published; `clerk`
    has recorded what waits of a user, where feedback is taken in meanwhile.
    """

    def __init__(
        self,
        database: Database,
        settings: CollectorSettings,
        tenants: Tenants,
        committed: Callable[[], None],
        spools: Spools | None = None,
        clerk: Clerk | None = None,
    ) -> None:
        self._database = database
        self._settings = settings
        self._tenants = tenants
        self._committed = committed
        self._spools = spools or Spools()
        self._clerk = clerk
        self._wake = asyncio.Event()
        self._finished = asyncio.Condition()
        self._pause = Pause(settings.max_backoff_seconds)
        self._expire_at = 0.0
        self._gone_here: set[str] = set()
        """Erasures whose content is in no file of the collector any more, though they are not finished."""

    async def forget(self, tenant: str, user_id: str) -> ForgetResponse:
        """Erases all of a user; returns when nothing is left in any file of the collector.

        Raises what `Database.write` raises. A caller who gives up waiting changes nothing: it is finished all the same,
        and asking again tells what came of it.
        """
        await self._settle(tenant, user_id)
        elsewhere = bool(self._spools.addresses)
        work = partial(erasure.forget, rules=self._settings.rules, tenant=tenant, user_id=user_id, elsewhere=elsewhere)
        await self._database.write(work)
        self._committed()
        self._wake.set()
        is_finished = partial(_is_finished, subject=user_hash(tenant, user_id))
        try:
            async with asyncio.timeout(self._settings.erase_timeout_seconds), self._finished:
                while not await self._database.read(is_finished):
                    await self._finished.wait()
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"Erasing took longer than {self._settings.erase_timeout_seconds:g} s; it goes on.",
                remedy="Ask again for what came of it; the collector's log says what it waits for.",
            ) from None
        return await self._report(tenant, user_id)

    async def _settle(self, tenant: str, user_id: str) -> None:
        """Has recorded what waits of the user, so that it is told what is erased."""
        if self._clerk is None:
            return
        try:
            waits = partial(inbox.holds_of, tenant=tenant, user_id=user_id)
            await self._clerk.settled(waits, self._settings.write_timeout_seconds)
        except errors.DeadlineExceeded as error:  # it is erased all the same, where it waits
            logger.warning("erased before it was recorded", extra={"error": str(error)})

    async def run(self) -> None:
        """Finishes what is to be finished and expires what is too old, until it is cancelled."""
        while True:
            self._wake.clear()
            try:
                due = time.monotonic() >= self._expire_at
                if due:
                    await self.expire()
                await self._finish()
                if due:  # last, as a policy server that is away would hold up all else
                    await self.expire_elsewhere()
                    self._expire_at = time.monotonic() + min(_HOUR, self._tenants.shortest_retention_seconds / 10)
                self._pause.reset()
            except RETRIED as error:
                logger.warning("erasing waits", extra={"error": str(error), "seconds": self._pause.seconds})
                await self._pause.wait()
                continue
            try:
                async with asyncio.timeout(max(0.0, self._expire_at - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def expire(self) -> None:
        """Erases what is past its tenant's retention, some at a time, so that feedback is taken meanwhile."""
        now = now_micros()
        for tenant in await self._database.read(_tenants_there):
            before = self._tenants[tenant].expired_before(now)
            rules = self._settings.rules
            expire = partial(erasure.expire, rules=rules, tenant=tenant, before=before, limit=EXPIRE_AT_ONCE)
            while before and await self._database.write(expire) is not None:
                self._committed()
        before = self._tenants.defaults.expired_before(now)
        if before:
            await self._database.write(partial(erasure.expire_dead_letters, before=before))

    async def expire_elsewhere(self) -> None:
        """Erases what policy servers keep past its retention. Raises `errors.Unavailable` where one is away."""
        if expired := await self._spools.expire(self._tenants.expired_before(now_micros())):
            logger.info("erased what policy servers kept too long", extra={"generations": expired})

    async def _finish(self) -> None:
        pending = await self._database.read(_pending)
        new = [(erasure_id, tenant) for erasure_id, tenant in pending if erasure_id not in self._gone_here]
        for erasure_id, tenant in new:
            samples = await self._database.read(partial(_samples, erasure_ids=[erasure_id]))
            exports = await self._database.read(partial(copies.known, tenant=tenant))
            scrubbed = await asyncio.to_thread(copies.scrub_all, exports, samples)  # 1
            await self._database.write(partial(_note, erasure_id=erasure_id, scrubbed=scrubbed))
        if new:
            rewrite = partial(vacuum, dialect=self._database.dialect)  # 2
            await asyncio.to_thread(self._database.write_inbox_now, tombstones.clear_inbox)
            await asyncio.to_thread(self._database.maintain_inbox_now, partial(rewrite, schema=tables.DOOR))
            await self._database.maintain(rewrite)
            self._gone_here.update(erasure_id for erasure_id, _ in new)
        ids = [erasure_id for erasure_id, _ in pending]
        elsewhere = await self._database.read(partial(tombstones.of_erasures, erasure_ids=ids)) if ids else {}
        await self._finished_with([erasure_id for erasure_id in ids if erasure_id not in elsewhere])
        if elsewhere:
            await self._spools.erase([each for hashes in elsewhere.values() for each in hashes])  # 3
            await self._finished_with(list(elsewhere))

    async def _finished_with(self, erasure_ids: list[str]) -> None:
        """4. Also where there was nothing to do: another collector on this database may have done it."""
        if erasure_ids:
            await self._database.write(partial(_mark, erasure_ids=erasure_ids))
            self._gone_here.difference_update(erasure_ids)
            metrics.ERASURES.inc(len(erasure_ids))
            logger.info("erased", extra={"erasures": erasure_ids})
        async with self._finished:
            self._finished.notify_all()

    async def _report(self, tenant: str, user_id: str) -> ForgetResponse:
        subject = user_hash(tenant, user_id)
        response, ids = await self._database.read(partial(_totals, subject=subject))
        samples = await self._database.read(partial(_samples, erasure_ids=ids))
        learnt = await asyncio.to_thread(
            versions_that_learnt, self._settings.store_path, self._settings.keys_path, samples
        )
        response.versions.extend(learnt.directly)
        response.descended_versions.extend(learnt.descended)
        # The last that may have been published is what was on its way at the end.
        clean = response.erased_at.ToMicroseconds() + int(self._settings.stream_retention_days * 86_400e6)
        response.stream_clean_at.FromMicroseconds(clean)
        return response


def _tenants_there(connection: Connection) -> list[str]:
    found: set[str] = set()
    for table in (tables.feedback, tables.generations):
        found.update(connection.execute(select(table.c.tenant).distinct()).scalars())
    return sorted(found)


def _pending(connection: Connection) -> list[tuple[str, str]]:
    row = tables.erasures.c
    found = select(row.erasure_id, row.tenant).where(row.finished_at.is_(None)).order_by(row.erasure_id)
    return [(erasure_id, tenant) for erasure_id, tenant in connection.execute(found)]


def _is_finished(connection: Connection, subject: bytes) -> bool:
    """Whether every erasure of a user is."""
    row = tables.erasures.c
    pending = select(row.erasure_id).where(row.subject == subject, row.finished_at.is_(None)).limit(1)
    return connection.execute(pending).first() is None


def _samples(connection: Connection, erasure_ids: list[str]) -> set[str]:
    samples: set[str] = set()
    for page in erasure.pages(erasure_ids):
        found = select(tables.erased_samples.c.sample_id).where(tables.erased_samples.c.erasure_id.in_(page))
        samples.update(connection.execute(found).scalars())
    return samples


def _note(connection: Connection, erasure_id: str, scrubbed: copies.Scrubbed) -> None:
    row = tables.erasures.c
    connection.execute(
        update(tables.erasures)
        .where(row.erasure_id == erasure_id)
        .values(
            exported_rows_erased=row.exported_rows_erased + scrubbed.rows,
            exports_out_of_reach="\n".join(scrubbed.out_of_reach),
        )
    )


def _mark(connection: Connection, erasure_ids: list[str]) -> None:
    for page in erasure.pages(erasure_ids):
        done = update(tables.erasures).where(tables.erasures.c.erasure_id.in_(page))
        connection.execute(done.values(finished_at=now_micros()))


def _totals(connection: Connection, subject: bytes) -> tuple[ForgetResponse, list[str]]:
    """What all erasures of a user came to, and their ids."""
    response, ids = ForgetResponse(), []
    rows = connection.execute(select(tables.erasures).where(tables.erasures.c.subject == subject)).all()
    for row in rows:
        ids.append(row.erasure_id)
        response.feedback_erased += row.feedback_erased
        response.generations_erased += row.generations_erased
        response.exported_rows_erased += row.exported_rows_erased
        for path in row.exports_out_of_reach.splitlines():
            if path not in response.exports_out_of_reach:
                response.exports_out_of_reach.append(path)
    erased_at = Timestamp()
    # Of the first that erased anything: asking again does not make it later.
    changed = [row for row in rows if row.feedback_erased or row.generations_erased] or rows
    erased_at.FromMicroseconds(max(row.finished_at for row in changed))
    response.erased_at.CopyFrom(erased_at)
    return response, ids
