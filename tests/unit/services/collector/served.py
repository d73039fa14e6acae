"""A service over gRPC, in the process of the test, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from functools import partial

import grpc
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from services.collector import outbox
from services.collector.admitting import Admitting
from services.collector.asking import Asking
from services.collector.clerk import Clerk
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.door import Door
from services.collector.rights.eraser import Eraser
from services.collector.rights.tenants import Tenants
from services.collector.rules import Rules
from services.collector.service import Preferences
from services.collector.submission import Checker
from services.collector.taking import Taking
from tests.unit.services.collector.parts import Deployment, curator_of, eventually
from thumbwheel import errors, serving
from thumbwheel.v1 import preference_pb2_grpc

OTHER_TENANT = ((serving.TENANT_KEY, "other"),)


class Client:
    """The stub, the second stage, and how often the relay was woken."""

    work: Clerk
    eraser: Eraser

    def __init__(self, channel: grpc.aio.Channel, address: str, database: Database) -> None:
        self.address = address
        self.stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        self.woken = 0
        self._database = database

    async def recorded(self) -> None:
        """Returns when all that was acknowledged is recorded."""
        await eventually(partial(self._database.read, outbox.levels), lambda levels: levels.unrecorded == 0)

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
async def hands_off(database: Database, deployment: Deployment, settings: CollectorSettings) -> AsyncIterator[Client]:
    """A service whose second stage does nothing until `client.work.run` runs."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    door = Door(Admitting(database, Checker(deployment.key, 1_000)))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Client(channel, f"127.0.0.1:{port}", database)
        client.work = Clerk(database, door, Taking(database, Rules()), client.wake, 0.05)
        client.eraser = Eraser(database, settings, Tenants(), lambda: None, clerk=client.work)
        asking = Asking(database, draw=random.Random(0))
        preferences = Preferences(
            database, curator_of(database), asking, client.eraser, door, client.work, client.wake, 5.0
        )
        preference_pb2_grpc.add_PreferenceServiceServicer_to_server(preferences, serving.guarded(server))
        await server.start()
        yield client
    await server.stop(None)
    await door.close()


@pytest.fixture
async def client(hands_off: Client) -> AsyncIterator[Client]:
    """A service that records what it acknowledges."""
    async with working(hands_off):
        yield hands_off


@contextlib.asynccontextmanager
async def working(client: Client) -> AsyncIterator[None]:
    """The second stage works in the body."""
    task = asyncio.create_task(client.work.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode) -> AsyncIterator[list[errors.ThumbwheelError]]:
    caught: list[errors.ThumbwheelError] = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        yield caught
    assert raised.value.code() == code, raised.value.details()
    caught.append(errors.from_rpc_error(raised.value))


def counter(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
