"""Forgetting a user reaches the generations that policy servers still keep on their own disks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from services.collector import tables
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.outbox import now_micros
from services.collector.rights.eraser import Eraser
from services.collector.rights.spools import Spools
from services.collector.rights.tenants import TenantRules, Tenants
from services.policy.recording import Recorder
from services.policy.service import PolicyService
from services.policy.spool import Spool
from tests.support import free_port
from tests.unit.services.collector.parts import Deployment, eventually
from tests.unit.services.collector.rights.test_rights_forget import arrive, asked_by, found_in, running
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server

SECRETS = ("mine-spooled-51c9", "mine-arrived-77aa")


@pytest.fixture
async def recorder(tmp_path: Path, log: MemoryLog) -> AsyncIterator[Recorder]:
    """A recorder whose broker is away, so that all it has is on the disk."""
    log.stop()
    made = Recorder(log, Spool(tmp_path / "spool" / "policy.db", limit=10**7))
    keeping = asyncio.create_task(made.keep())
    yield made
    keeping.cancel()
    await asyncio.wait([keeping])
    await made.close()


@contextlib.asynccontextmanager
async def serving(recorder: Recorder, address: str) -> AsyncIterator[None]:
    server = grpc.aio.server()
    without_engine: Any = SimpleNamespace(recorder=recorder)
    nothing: Any = None
    add_PolicyServiceServicer_to_server(PolicyService(without_engine, nothing, nothing, coalesce=0.0), server)
    server.add_insecure_port(address)
    await server.start()
    yield
    await server.stop(None)


async def test_nothing_of_a_forgotten_user_is_left_in_a_spool(
    database: Database, deployment: Deployment, settings: CollectorSettings, recorder: Recorder, log: MemoryLog
) -> None:
    arrived, bobs = asked_by(deployment, "ann", SECRETS[1]), asked_by(deployment, "bob", "bobs-0aa1")
    for event in (asked_by(deployment, "ann", SECRETS[0]), arrived, bobs):
        recorder.record(event)
    await recorder.flush(timeout=0.2)
    await arrive(database, arrived)
    assert {secret for _, secret in found_in(settings.home, SECRETS)} == set(SECRETS), "planted"
    address = f"127.0.0.1:{free_port()}"
    asked = settings.model_copy(update={"policies": address, "erase_timeout_seconds": 0.5})

    async def forget() -> int:
        async with running(Eraser(database, asked, Tenants(), lambda: None, Spools.of(asked))) as eraser:
            return (await eraser.forget("default", "ann")).generations_erased

    with pytest.raises(errors.DeadlineExceeded, match="it goes on"):
        await forget()  # the policy server is away: what it keeps is not erased yet
    left = found_in(settings.home, SECRETS)
    assert {secret for _, secret in left} == set(SECRETS)
    assert all(name.startswith("policy.db") for name, _ in left)
    async with serving(recorder, address):
        asked = asked.model_copy(update={"erase_timeout_seconds": 30.0})
        assert await forget() == 1
    assert found_in(settings.home, SECRETS) == set()
    assert {secret for _, secret in found_in(settings.home, ["bobs-0aa1"])} == {"bobs-0aa1"}
    log.start()
    sending = asyncio.create_task(recorder.send())
    await recorder.flush(timeout=20.0)
    sending.cancel()
    await asyncio.wait([sending])
    assert [record.key.decode() for record in log.records(topics.GENERATIONS)] == [bobs.generation.prompt_id]


async def test_a_user_whom_the_collector_never_saw_is_erased_from_spools(
    database: Database, deployment: Deployment, settings: CollectorSettings, recorder: Recorder
) -> None:
    recorder.record(asked_by(deployment, "ann", SECRETS[0]))
    await recorder.flush(timeout=0.2)
    address = f"127.0.0.1:{free_port()}"
    asked = settings.model_copy(update={"policies": address})
    eraser = Eraser(database, asked, Tenants(), lambda: None, Spools.of(asked))
    async with serving(recorder, address), running(eraser):
        await eraser.forget("default", "ann")
    assert found_in(settings.home, SECRETS) == set()


async def test_what_its_tenant_lets_nobody_keep_longer_goes_from_spools_too(
    database: Database, deployment: Deployment, settings: CollectorSettings, recorder: Recorder
) -> None:
    now, day = now_micros(), 86_400_000_000
    for tenant, age, word in (
        ("clinic", 31, "clinic-old"),
        ("clinic", 29, "clinic-new"),
        ("shop", 300, "shop-old"),
        ("other", 91, "other-old"),
        ("other", 89, "other-new"),
    ):
        event = asked_by(deployment, "ann", word)
        event.tenant = tenant
        event.finished_at.FromMicroseconds(now - age * day)
        recorder.record(event)
    await recorder.flush(timeout=0.2)
    address = f"127.0.0.1:{free_port()}"
    asked = settings.model_copy(update={"policies": address})
    kept = {"clinic": TenantRules(retention_days=30.0), "shop": TenantRules()}
    eraser = Eraser(database, asked, Tenants(TenantRules(retention_days=90.0), kept), lambda: None, Spools.of(asked))
    with pytest.raises(errors.Unavailable, match="has not erased what it keeps"):
        await eraser.expire_elsewhere()  # it is away
    async with serving(recorder, address):
        await eraser.expire_elsewhere()
    left = {"clinic-new", "shop-old", "other-new"}
    assert {word for _, word in found_in(settings.home, [*left, "clinic-old", "other-old"])} == left


async def test_a_policy_server_that_is_away_holds_up_no_other_erasure(
    database: Database, deployment: Deployment, settings: CollectorSettings
) -> None:
    words = ("forgotten-12fe", "expired-90bb", "stays-77c0")
    anns, old, new = (asked_by(deployment, user, word) for user, word in zip(("ann", "bob", "cyd"), words, strict=True))
    await arrive(database, anns, old, new)
    long_ago = now_micros() - 8 * 86_400_000_000
    aged = tables.generations.update().where(tables.generations.c.generation_id == old.event_id)
    await database.write(lambda connection: connection.execute(aged.values(stored_at=long_ago)))
    away = settings.model_copy(update={"policies": f"127.0.0.1:{free_port()}", "erase_timeout_seconds": 20.0})
    eraser = Eraser(database, away, Tenants(TenantRules(retention_days=7)), lambda: None, Spools.of(away))
    async with running(eraser):
        forgetting = asyncio.create_task(eraser.forget("default", "ann"))
        left = await eventually(
            lambda: asyncio.to_thread(found_in, settings.home, words),
            lambda found: len({word for _, word in found}) < 2,
        )
        assert {word for _, word in left} == {"stays-77c0"}
        rows = await eventually(
            lambda: database.read(lambda connection: connection.execute(tables.erasures.select()).all()),
            lambda rows: any(row.finished_at for row in rows),
        )
        assert sorted((row.subject is None, row.finished_at is not None) for row in rows) == [
            (False, False),  # it may be spooled: she is told when it is not
            (True, True),
        ]
        assert not forgetting.done()
        forgetting.cancel()
