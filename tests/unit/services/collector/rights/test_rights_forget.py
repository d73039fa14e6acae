"""Forgetting a user: what goes, what stays, what must not come back, and that it is off the disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest

from services.collector import ledger, outbox, tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.outbox import now_micros
from services.collector.rights import admission, copies, erasure
from services.collector.rights import eraser as erasers
from services.collector.rights.eraser import Eraser
from services.collector.rights.tenants import TenantRules, Tenants
from services.collector.rules import Rules
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import TIE, A, B, Deployment
from thumbwheel import errors, files
from thumbwheel.auth import ManifestSigner, ManifestVerifier
from thumbwheel.checkpoints.store import SAMPLES, LocalStore, version_name
from thumbwheel.stream import topics
from thumbwheel.v1.events_pb2 import (
    ComparisonEvent,
    ComparisonState,
    DeadLetter,
    FeedbackEvent,
    GenerationEvent,
    ThumbEvent,
)
from thumbwheel.v1.preference_pb2 import FeedbackState, ForgetResponse, ThumbValue
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, Lineage, ModelRole


@contextlib.asynccontextmanager
async def running(eraser: Eraser) -> AsyncIterator[Eraser]:
    task = asyncio.create_task(eraser.run())
    try:
        yield eraser
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


async def forget(database: Database, settings: CollectorSettings, user: str, tenant: str = "default") -> ForgetResponse:
    async with running(Eraser(database, settings, Tenants(), lambda: None)) as eraser:
        return await eraser.forget(tenant, user)


async def arrive(database: Database, *events: GenerationEvent) -> None:
    curator = parts.curator_of(database)
    await database.write(lambda c: ledger.store(c, curator, admission.admitted(c, events, Tenants())))


def found_in(home: Path, secrets: Iterable[str]) -> set[tuple[str, str]]:
    """Which of the texts stand in which files, in any common encoding."""
    return {
        (path.name, secret)
        for path in home.rglob("*")
        if path.is_file()
        for data in [path.read_bytes()]
        for secret in secrets
        if any(secret.encode(coding) in data for coding in ("utf-8", "utf-16-le"))
    }


def asked_by(deployment: Deployment, user: str, word: str, prompt_id: str = "") -> GenerationEvent:
    event = deployment.generation(f"response-{word} " * 700, prompt_id, words=f"prompt-{word} " * 50)
    event.user_id = user
    return event


async def outbox_messages(database: Database) -> list[ComparisonEvent | FeedbackEvent | DeadLetter]:
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in (ComparisonEvent, FeedbackEvent, DeadLetter)}
    rows = await database.read(partial(outbox.waiting, limit=1000))
    return [kinds[row.schema].FromString(row.value) for row in rows]


async def test_nothing_of_the_user_is_left_in_any_file(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    mine = asked_by(deployment, "ann-7f3a", "mine-51c9")
    other = asked_by(deployment, "ann-7f3a", "mine-51c9-b", mine.generation.prompt_id)
    bobs = asked_by(deployment, "bob", "bobs")
    nobodys = asked_by(deployment, "", "nobodys-88d1")
    await arrive(database, mine, other, bobs, nobodys)
    vote = await deployment.submit(database, parts.comparison(mine, other, user="ann-7f3a"))
    await deployment.submit(database, parts.edit(bobs, "edit-mine-77aa", user="ann-7f3a"))
    await deployment.submit(database, parts.comment(nobodys, "comment-mine-03bb", user="ann-7f3a"))
    await deployment.submit(database, parts.comment(mine, "comment-of-bob-on-mine-12ef", user="bob"))
    kept = await deployment.submit(database, parts.edit(bobs, "edit-of-bob", user="bob"))
    held = await deployment.submit(
        database, parts.edit(deployment.generation("later"), "edit-held-61f0", user="ann-7f3a")
    )
    await database.write(
        lambda c: outbox.add(
            c,
            [
                outbox.Event("d1", topics.DEADLETTER, "t", DeadLetter(value=mine.SerializeToString() + b"\xff")),
                outbox.Event("d2", topics.DEADLETTER, "t", DeadLetter(value=bobs.SerializeToString())),
            ],
        )
    )
    secrets = ("ann-7f3a", "mine-51c9", "nobodys-88d1", "edit-mine-77aa", "comment-mine-03bb", "-12ef", "-61f0")
    assert {secret for _, secret in found_in(settings.home, secrets)} == set(secrets), "planted"
    response = await forget(database, settings, "ann-7f3a")
    assert found_in(settings.home, secrets) == set()
    assert (response.feedback_erased, response.generations_erased) == (5, 3)
    assert {secret for _, secret in found_in(settings.home, ("response-bobs", "edit-of-bob"))} == {
        "response-bobs",
        "edit-of-bob",
    }
    find = partial(ledger.find, feedback_ids=[vote.record.feedback_id, kept.record.feedback_id], tenant="default")
    assert [record.feedback_id for record in await database.read(find)] == [kept.record.feedback_id]
    messages = await outbox_messages(database)
    retracted = [
        m for m in messages if isinstance(m, ComparisonEvent) and m.state == ComparisonState.COMPARISON_STATE_RETRACTED
    ]
    assert vote.record.comparison_id in {event.comparison_id for event in retracted}
    assert len(retracted) == 2, "the vote and the edit"
    for event in retracted:
        assert (event.chosen.text, event.rejected.text, event.HasField("prompt")) == ("", "", False)
    told = {m.record.feedback_id: m.record for m in messages if isinstance(m, FeedbackEvent)}
    assert (told[held.record.feedback_id].reason, told[held.record.feedback_id].HasField("feedback")) == (
        "forgotten",
        False,
    )
    assert [m.value for m in messages if isinstance(m, DeadLetter)] == [bobs.SerializeToString()]


async def test_again_says_the_same(database: Database, deployment: Deployment, settings: CollectorSettings) -> None:
    mine = asked_by(deployment, "ann", "x")
    await arrive(database, mine)
    await deployment.submit(database, parts.comment(mine, "hm"))
    first = await forget(database, settings, "ann")
    assert await forget(database, settings, "ann") == first
    assert first.stream_clean_at.ToMicroseconds() == first.erased_at.ToMicroseconds() + 14 * 86_400_000_000
    nobody = await forget(database, settings, "nobody")
    assert (nobody.feedback_erased, nobody.generations_erased) == (0, 0)


async def test_what_was_forgotten_does_not_come_back(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    mine, late = asked_by(deployment, "ann", "early"), asked_by(deployment, "ann", "late")
    nobodys = asked_by(deployment, "", "nobodys")
    awaited = asked_by(deployment, "", "awaited")
    bobs = asked_by(deployment, "bob", "bobs")
    await arrive(database, mine, nobodys)
    for judged in (mine, nobodys, awaited, bobs):
        await deployment.submit(database, parts.comment(judged, "hm"))
    await forget(database, settings, "ann")
    await arrive(database, mine, late, nobodys, awaited, bobs)
    ids = await database.read(lambda c: c.execute(tables.generations.select()).scalars().all())
    assert ids == [bobs.event_id]
    with pytest.raises(errors.FailedPrecondition, match="was forgotten"):
        await deployment.submit(database, parts.comment(bobs, "me again", user="ann"))
    for gone in (mine, nobodys, awaited):
        with pytest.raises(errors.FailedPrecondition, match="was erased"):
            await deployment.submit(database, parts.comment(gone, "hm", user="bob"))
    assert (await deployment.submit(database, parts.comment(bobs, "hm", user="bob"))).changed
    other = Deployment(deployment.key, "other")
    theirs = asked_by(other, "ann", "another tenant's ann")
    await arrive(database, theirs)
    assert (await other.submit(database, parts.comment(theirs, "hm", user="ann"))).changed


async def test_tenants_have_their_own_users(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    other = Deployment(deployment.key, "other")
    mine, theirs = asked_by(deployment, "ann", "here"), asked_by(other, "ann", "there")
    await arrive(database, mine, theirs)
    await other.submit(database, parts.comment(theirs, "keep-this"))
    assert (await forget(database, settings, "ann")).generations_erased == 1
    assert {secret for _, secret in found_in(settings.home, ["response-there", "keep-this", "response-here"])} == {
        "response-there",
        "keep-this",
    }
    assert (await forget(database, settings, "ann", "other")).feedback_erased == 1


async def test_killed_between_commit_and_vacuum(
    database: Database, deployment: Deployment, settings: CollectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = asked_by(deployment, "ann", "unvacuumed")
    await arrive(database, mine)
    await database.maintain(lambda c: c.execute("PRAGMA secure_delete=OFF").close())
    await database.write(partial(erasure.forget, rules=Rules(), tenant="default", user_id="ann"))
    database.close()
    assert found_in(settings.home, ["response-unvacuumed"]), "deleted, and still on the disk"
    again = Database(settings.database_url)
    try:
        async with running(Eraser(again, settings, Tenants(), lambda: None)):
            await parts.eventually(lambda: again.read(erasers._pending), lambda pending: not pending)
        assert found_in(settings.home, ["response-unvacuumed"]) == set()
        assert (await forget(again, settings, "ann")).generations_erased == 1
    finally:
        again.close()


async def test_a_reader_delays_the_vacuum_and_no_more(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    await arrive(database, asked_by(deployment, "ann", "read"))
    reading, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(connection: object) -> None:
        database_rows = connection.execute(tables.generations.select()).all()  # type: ignore[attr-defined]  # a Connection
        assert len(database_rows) == 1
        loop.call_soon_threadsafe(reading.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(20)

    holding = asyncio.create_task(database.read(hold))
    await reading.wait()
    forgetting = asyncio.create_task(forget(database, settings, "ann"))
    await parts.eventually(lambda: database.read(erasers._pending), bool)
    assert not forgetting.done()
    release.set()
    await holding
    assert (await forgetting).generations_erased == 1
    assert found_in(settings.home, ["response-read"]) == set()


def publish(home: Path, sequence: int, samples: Sequence[str], parent: str = "") -> str:
    role = ModelRole.MODEL_ROLE_POLICY
    text = "".join(f"{sample}\n" for sample in sorted(samples))
    lineage = Lineage(sample_count=len(samples), samples_sha256=files.sha256_bytes(text.encode()))
    name = version_name(role, sequence)
    manifest = CheckpointManifest(version=name, role=role, sequence=sequence, parent=parent, lineage=lineage)
    store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))

    def write(folder: Path) -> None:
        (folder / SAMPLES).write_text(text)

    store.publish(manifest, write, ManifestSigner.load(home / "keys"))
    return name


async def test_the_versions_that_learnt_are_named(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    mine = deployment.pair()
    for one in mine:
        one.user_id = "ann"
    await arrive(database, *mine)
    sample = (await deployment.submit(database, parts.comparison(*mine))).record.comparison_id
    names = [publish(settings.home, 0, [])]
    for sequence, samples in enumerate([["a"], ["b", sample], ["c"], ["d"]], start=1):
        names.append(publish(settings.home, sequence, samples, names[-1]))
    aside = publish(settings.home, 9, ["e"], names[1])
    first = await forget(database, settings, "ann")
    assert (list(first.versions), list(first.descended_versions)) == ([names[2]], names[3:])
    # One that was being trained meanwhile comes to light when asked again; one that does not verify counts.
    late = publish(settings.home, 10, [sample], names[1])
    (settings.home / "store" / aside / SAMPLES).write_text("altered")
    again = await forget(database, settings, "ann")
    assert list(again.versions) == [names[2], aside, late]


async def test_exported_rows_go_too(database: Database, deployment: Deployment, settings: CollectorSettings) -> None:
    mine = deployment.pair()
    for one in mine:
        one.user_id = "ann"
    await arrive(database, *mine)
    sample = (await deployment.submit(database, parts.comparison(*mine))).record.comparison_id
    paths = [settings.home / name for name in ("whole.jsonl", "half.jsonl", "gone.jsonl", "no-index.jsonl")]
    lines = [b'{"chosen": "mine"}\n', b'{"chosen": "bobs"}\n', b'{"chosen": "mine again"}\n']
    index = "".join(
        f"{hashlib.sha256(line.strip()).hexdigest()} {id}\n"
        for line, id in zip(lines, (sample, "b", sample), strict=True)
    )
    for path in paths:
        await database.write(partial(copies.register, tenant="default", path=path))
        copies.index_of(path).write_text(index)
    await database.write(partial(copies.register, tenant="other", path=settings.home / "other.jsonl"))
    paths[0].write_bytes(b"".join(reversed(lines)))
    copies.part_of(paths[1]).write_bytes(b"".join(lines[:2]))
    paths[3].write_bytes(b"".join(lines))
    copies.index_of(paths[3]).unlink()
    paths[0].chmod(0o600)
    response = await forget(database, settings, "ann")
    assert paths[0].read_bytes() == lines[1]
    assert paths[0].stat().st_mode & 0o777 == 0o600
    assert copies.index_of(paths[0]).read_text() == index.splitlines(keepends=True)[1]
    assert copies.part_of(paths[1]).read_bytes() == lines[1]
    assert response.exported_rows_erased == 3
    assert list(response.exports_out_of_reach) == [str(paths[2]), str(paths[3])]


async def test_retention_erases_what_is_too_old(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    old, new = deployment.pair("response-old", "x"), deployment.pair("response-new", "y")
    other = Deployment(deployment.key, "other").pair("response-others", "z")
    votes = []
    for pair in (old, new):
        await arrive(database, *pair)
        votes.append(await deployment.submit(database, parts.comparison(*pair)))
    await arrive(database, *other)
    day = 86_400_000_000
    await database.write(
        lambda c: c.execute(
            tables.generations.update()
            .where(tables.generations.c.generation_id.in_([one.event_id for one in (*old, *other)]))
            .values(stored_at=now_micros() - 8 * day)
        )
    )
    await database.write(lambda c: outbox.add(c, [outbox.Event("d", topics.DEADLETTER, "t", DeadLetter(value=b"raw"))]))
    await database.write(
        lambda c: c.execute(
            tables.outbox.update().where(tables.outbox.c.event_id == "d").values(created_at=now_micros() - 8 * day)
        )
    )
    named = {"other": TenantRules()}
    tenants = Tenants(TenantRules(retention_days=7), named)
    async with running(Eraser(database, settings, tenants, lambda: None)):
        await parts.eventually(
            lambda: database.read(lambda c: c.execute(tables.erasures.select()).all()),
            lambda rows: bool(rows) and all(row.finished_at for row in rows),
        )
    texts = ["response-old", "response-new", "response-others", "raw"]
    assert {text for _, text in found_in(settings.home, texts)} == {"response-new", "response-others"}
    find = partial(ledger.find, feedback_ids=[vote.record.feedback_id for vote in votes], tenant="default")
    assert [one.feedback_id for one in await database.read(find)] == [votes[1].record.feedback_id]
    retracted = [
        m.comparison_id
        for m in await outbox_messages(database)
        if isinstance(m, ComparisonEvent) and m.state == ComparisonState.COMPARISON_STATE_RETRACTED
    ]
    assert retracted == [votes[0].record.comparison_id]


async def test_many_are_erased_in_pages(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    events = [deployment.generation(f"{i}") for i in range(1_203)]
    for one in events:
        one.user_id = "ann"
    await arrive(database, *events)
    thumbs = [await deployment.submit(database, parts.thumb(one)) for one in events[:20]]
    ties = await deployment.submit(database, parts.comparison(*deployment.pair(), TIE))
    response = await forget(database, settings, "ann")
    assert (response.generations_erased, response.feedback_erased) == (1_203, len(thumbs) + 1)
    assert ties.changed


async def test_what_others_said_is_judged_again_without_it(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    pair = deployment.pair()
    for one in pair:
        one.user_id = "cyd"
    await arrive(database, *pair)
    await deployment.submit(database, parts.comparison(*pair, A, user="ann"))
    bobs = (await deployment.submit(database, parts.comparison(*pair, B, user="bob"))).record
    assert (bobs.state, bobs.reason) == (FeedbackState.FEEDBACK_STATE_APART, "contested")
    await forget(database, settings, "ann")
    find = partial(ledger.find, feedback_ids=[bobs.feedback_id], tenant="default")
    [after] = await database.read(find)
    assert (after.state, after.reason) == (FeedbackState.FEEDBACK_STATE_ACCEPTED, "preferred")
    accepted = [m for m in await outbox_messages(database) if isinstance(m, ComparisonEvent)]
    assert [m.feedback_ids for m in accepted if m.state == ComparisonState.COMPARISON_STATE_ACCEPTED] == [
        [bobs.feedback_id]
    ]


async def test_thumbs_of_two_users_come_apart(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    pair = deployment.pair("up", "down")
    for one in pair:
        one.user_id = "cyd"
    await arrive(database, *pair)
    await deployment.submit(database, parts.thumb(pair[0], user="ann"))
    down = parts.thumb(pair[1], user="bob")
    down.thumb.value = ThumbValue.THUMB_VALUE_DOWN
    bobs = (await deployment.submit(database, down)).record
    assert (bobs.state, bobs.reason) == (FeedbackState.FEEDBACK_STATE_ACCEPTED, "paired_thumbs")
    await forget(database, settings, "ann")
    rows = await database.read(partial(outbox.waiting, limit=1000))
    thumbs = [ThumbEvent.FromString(row.value) for row in rows if row.topic == topics.THUMBS]
    left = {t.thumb_id: t for t in thumbs if t.state == ComparisonState.COMPARISON_STATE_ACCEPTED}
    assert [list(t.feedback_ids) for t in left.values()] == [[bobs.feedback_id]]
    pairs = [ComparisonEvent.FromString(row.value) for row in rows if row.topic == topics.COMPARISONS]
    assert [e.state for e in pairs] == [ComparisonState.COMPARISON_STATE_RETRACTED]
    assert pairs[0].chosen.text == ""
