"""How far each rater is trusted: assessed now and then over everything; whom it concerns is curated again.

    all judgements ──▶ assess ──▶ whose standing changed? ──▶ written down, stale ──▶ their groups decided ──▶ not stale

A rater is stale from the moment the new standing is written until all that the rater judged has been curated by it, so
that a collector that dies in between goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Connection, insert, select, update

from services.collector import metrics, standing
from services.collector.curation import Rater, RaterId, Raters, assess
from services.collector.database import Database
from services.collector.decide import decide
from services.collector.outbox import now_micros
from services.collector.pause import RETRIED
from services.collector.rights import tombstones
from services.collector.rules import Rules
from services.collector.tables import feedback, raters
from thumbwheel.forgotten import user_hash

logger = logging.getLogger(__name__)

ASSESS_SECONDS = 600.0
WEIGHT_STEP = 0.05
"""A rater's weight is left as it is until it is off by this much: small changes are not worth telling everybody."""
GROUPS_AT_ONCE = 32


class Assessor:
    """Assesses the raters for ever. `committed` is called after each commit that is to be published."""

    def __init__(self, database: Database, rules: Rules, every_seconds: float, committed: Callable[[], None]) -> None:
        self._database = database
        self._rules = rules
        self._every_seconds = every_seconds
        self._committed = committed

    async def run(self) -> None:
        """Assesses at the start and then every so often, until it is cancelled. A busy database is tried again."""
        while True:
            try:
                await self.once()
            except RETRIED as error:
                logger.warning("raters not assessed", extra={"error": str(error)})
            await asyncio.sleep(self._every_seconds)

    async def once(self) -> int:
        """One assessment. Returns how many raters' standing changed."""
        async with asyncio.timeout(ASSESS_SECONDS):
            changed = await asyncio.to_thread(self._database.read_now, partial(assessed, rules=self._rules))
        for part in _parts(changed):
            await self._database.write(partial(put, changed=part))
        await curate_stale(self._database, self._rules, self._committed)
        return len(changed)


def assessed(connection: Connection, rules: Rules) -> dict[RaterId, Rater]:
    """The raters whose standing is another than is written down."""
    known, overrides = standing.all_raters(connection)
    votes = standing.everything(connection, learn_from_cut=rules.learn_from_cut)
    found: Raters = assess(votes, rules.curation, overrides)
    newcomer = Raters.none(rules.curation).newcomer
    return {who: found[who] for who in found if _differs(found[who], known.get(who, newcomer))}


def put(connection: Connection, changed: Mapping[RaterId, Rater]) -> None:
    """Writes these standings down, but those of users who were forgotten while they were assessed."""
    hashes = {who: user_hash(*who) for who in changed}
    gone = tombstones.present(connection, list(hashes.values()))
    for who, rater in changed.items():
        if hashes[who] in gone:
            continue
        values = {
            "reliability": rater.reliability,
            "weight": rater.weight,
            "votes": rater.votes,
            "judged": rater.judged,
            "gold_judged": rater.gold_judged,
            "gold_correct": rater.gold_correct,
            "quarantine": rater.quarantine.value if rater.quarantine else "",
            "bursts": json.dumps(rater.bursts),
        }
        if not _update(connection, who, values):
            first = {"tenant": who.tenant, "user_id": who.user_id, "by_hand": "", "stale": True}
            connection.execute(insert(raters), {**first, **values, "updated_at": now_micros()})


async def quarantine(database: Database, rules: Rules, who: RaterId, state: str, committed: Callable[[], None]) -> None:
    """An operator quarantines or releases a rater (`standing.QUARANTINED`, `standing.RELEASED`); an empty state leaves
    the rater to the assessment again. What the rater judged is curated anew.
    """
    newcomer = Raters.none(rules.curation).newcomer
    await database.write(partial(_by_hand, who=who, state=state, newcomer=newcomer))
    await curate_stale(database, rules, committed)


def _by_hand(connection: Connection, who: RaterId, state: str, newcomer: Rater) -> None:
    if not _update(connection, who, {"by_hand": state}):
        put(connection, {who: newcomer})
        _update(connection, who, {"by_hand": state})


async def curate_stale(database: Database, rules: Rules, committed: Callable[[], None]) -> None:
    """Curates again what stale raters have judged, some groups at a time, so that nobody waits long for the writer."""
    for who in await database.read(_stale):
        after = ""
        while groups := await database.read(partial(_groups_of, who=who, after=after)):
            told = await database.write(partial(decide, rules=rules, tenant=who.tenant, groups=groups))
            metrics.RECURATED.inc(len(told))
            committed()
            after = groups[-1]
        await database.write(partial(_update, who=who, values={"stale": False}))


def _stale(connection: Connection) -> list[RaterId]:
    found = connection.execute(select(raters.c.tenant, raters.c.user_id).where(raters.c.stale))
    return [RaterId(*row) for row in found]


def _groups_of(connection: Connection, who: RaterId, after: str) -> list[str]:
    return list(
        connection.execute(
            select(feedback.c.group_id)
            .distinct()
            .where(
                feedback.c.tenant == who.tenant,
                feedback.c.user_id == who.user_id,
                feedback.c.joined == "",
                feedback.c.group_id > after,
            )
            .order_by(feedback.c.group_id)
            .limit(GROUPS_AT_ONCE)
        ).scalars()
    )


def _update(connection: Connection, who: RaterId, values: Mapping[str, Any]) -> bool:
    here = (raters.c.tenant == who.tenant) & (raters.c.user_id == who.user_id)
    changed = {"stale": True, **values, "updated_at": now_micros()}
    return connection.execute(update(raters).where(here).values(changed)).rowcount > 0


def _differs(new: Rater, old: Rater) -> bool:
    apart = abs(new.weight - old.weight) >= WEIGHT_STEP
    return apart or (new.quarantine, new.bursts) != (old.quarantine, old.bursts)


def _parts(changed: Mapping[RaterId, Rater]) -> Iterator[dict[RaterId, Rater]]:
    items = iter(changed.items())
    while part := dict(islice(items, GROUPS_AT_ONCE)):
        yield part
