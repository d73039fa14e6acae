"""Many submissions in one commit: each comes to what it would by itself, at the cost of one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import event

from services.collector import intake, many, outbox, tables
from services.collector.database import Database
from services.collector.identity import Arrival
from services.collector.intake import Incoming, Result
from services.collector.records import Recorded
from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment, curator_of, store
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import AspectPreference, Feedback


async def submit(
    database: Database, deployment: Deployment, pieces: Sequence[Feedback], arrivals: Sequence[Arrival] = ()
) -> list[Result]:
    """All of them in one transaction."""
    checker = Checker(deployment.key, 1_000)
    given = [*arrivals, *[None] * (len(pieces) - len(arrivals))]
    incoming = [
        Incoming(checker.check(one, tenant="default"), arrival=arrival)
        for one, arrival in zip(pieces, given, strict=True)
    ]
    curator = curator_of(database)
    return await database.write(lambda connection: intake.submit(connection, incoming, curator))


async def standing(database: Database) -> list[tuple[object, ...]]:
    """All feedback as it stands, in the order of its keys: not what it was on the way there."""
    columns = ("idempotency_key", "feedback_id", "state", "reason", "weight", "sample_id")
    others = ("superseded_by", "user_rank", "tenant_rank", "group_id")
    rows = await database.read(lambda connection: connection.execute(tables.feedback.select()).all())
    return sorted(tuple(getattr(row, name) for name in (*columns, *others)) for row in rows)


async def test_many_at_once_come_to_what_they_come_to_one_by_one(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    prompt_id = parts.new_id()
    one, two, three = (deployment.generation(text, prompt_id) for text in ("one", "two", "three"))
    other, unarrived = deployment.pair(), deployment.pair()
    pieces = [
        parts.comparison(one, two, key="1", user="ann"),
        parts.comparison(two, three, key="2", user="bob"),
        parts.comparison(three, one, key="3", user="cyd"),  # closes a cycle
        parts.comparison(one, two, B, key="4", user="ann"),  # corrects the first: the thumbs say otherwise
        parts.thumb(one, key="5", user="dan"),
        parts.thumb(two, up=False, key="6", user="eve"),
        parts.edit(one, "better", key="7", user="ann"),
        parts.comment(one, "well", key="8"),
        parts.comparison(*other, TIE, key="9"),
        parts.comparison(*unarrived, key="A"),
    ]
    arrivals = [Arrival.now() for _ in pieces]
    again = Database(f"sqlite:///{tmp_path / 'again.db'}")
    try:
        for into in (database, again):
            await store(into, one, two, three, *other)
        together = await submit(database, deployment, pieces, arrivals)
        for piece, arrival in zip(pieces, arrivals, strict=True):
            await submit(again, deployment, [piece], [arrival])
        assert await standing(database) == await standing(again)
    finally:
        again.close()
    assert [type(result) for result in together] == [Recorded] * len(pieces)
    assert [row[2] for row in await standing(database)] == [
        *["SUPERSEDED", "ACCEPTED", "ACCEPTED", "APART", "APART", "APART", "ACCEPTED"],
        *["RECORDED", "APART", "HELD"],
    ]


async def test_a_key_counts_once_within_a_commit_too(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    vote, other = parts.comparison(a, b, A, key="k"), parts.comparison(a, b, B, key="k")
    first, again, conflict = await submit(database, deployment, [vote, vote, other])
    assert isinstance(first, Recorded)
    assert isinstance(again, Recorded)
    assert (first.changed, again.changed, again.record) == (True, False, first.record)
    assert isinstance(conflict, errors.Conflict)
    assert len(await standing(database)) == 1


async def test_what_is_refused_holds_up_nobody(database: Database, deployment: Deployment) -> None:
    a, b = deployment.pair()
    await store(database, a, b)
    unknown = parts.comparison(a, b, user="bob")
    unknown.guidelines_version = "never-shown"
    results = await submit(database, deployment, [parts.comparison(a, b), unknown, parts.comparison(a, b, user="cyd")])
    assert [type(result) for result in results] == [Recorded, errors.InvalidArgument, Recorded]
    assert [row[2] for row in await standing(database)] == ["ACCEPTED"] * 2
    assert (await database.read(outbox.levels)).unpublished == 4
    with pytest.raises(errors.InvalidArgument, match="never-shown"):
        await deployment.submit(database, unknown)


async def test_many_cost_as_many_statements_as_few(database: Database, deployment: Deployment) -> None:
    statements: list[str] = []

    async def counted(number: int) -> int:
        pairs = [deployment.pair() for _ in range(number)]
        await store(database, *(one for pair in pairs for one in pair))
        pieces = [parts.comparison(*pair, user=f"user-{i}") for i, pair in enumerate(pairs)]
        for piece in pieces:
            piece.comparison.aspects.append(AspectPreference(aspect="fluency", preference=A))
        statements.clear()
        results = await submit(database, deployment, pieces)
        assert {result.state for result in results if isinstance(result, Recorded)} == {"ACCEPTED"}
        return len(statements)

    def note(*called: object) -> None:
        statements.append(str(called[2]))

    event.listen(database._engine, "before_cursor_execute", note)
    await counted(1)  # once, it reads which prompts there are
    few, lots = await counted(2), await counted(96)
    assert few == lots < 30


async def test_any_number_of_values_is_looked_up(database: Database) -> None:
    ids = [f"{number:04}" for number in range(many.PAGE + 1)]
    rows = [{"tenant": "t", "user_id": id, "day": 1, "count": 7} for id in ids]
    await database.write(lambda connection: connection.execute(tables.tallies.insert(), rows))
    sql = "SELECT user_id FROM tallies WHERE tenant = :tenant AND user_id IN (:many)"
    pairs = "SELECT user_id FROM tallies WHERE (tenant, user_id) IN (VALUES :many)"
    for count in (0, 1, 9, many.PAGE + 1):
        found = await database.read(partial(many.find, sql=sql, values=ids[:count], tenant="t"))
        assert sorted(row.user_id for row in found) == ids[:count]
        found = await database.read(partial(many.find, sql=pairs, values=[("t", id) for id in ids[:count]]))
        assert sorted(row.user_id for row in found) == ids[:count]
