"""Two releases at once, under load: applications and policies of the one before and of this one, around a collector
that is taken down and comes back; readers of both on the stream. The one before is its contracts, out of
`proto/golden/`: it sends and understands what it knew, and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import Connection, create_engine, inspect, select

from services.collector import tables
from services.collector.database import Database, migrate
from tests.releases import RELEASES, Release
from tests.support import Process, free_port
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment, store
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.v1.events_pb2 import ComparisonEvent, GenerationEvent
from thumbwheel.v1.preference_pb2 import Feedback, SubmitFeedbackRequest, SubmitFeedbackResponse

SECONDS = 60.0
VOTES = 120
OLD_SCHEMA = "0002"
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
BEFORE = Release(RELEASES[-1])


class World:
    """Broker, collector, and load of both releases."""

    def __init__(self, home: Path, url: str) -> None:
        self.deployment = Deployment.at(home)
        self.broker = EmbeddedBroker(port=free_port(), log=home / "broker.log")
        self.broker.start()
        self.log = open_log(self.broker.bootstrap_servers)
        arguments = ["--home", str(home), "--bootstrap-servers", self.broker.bootstrap_servers]
        arguments += ["--database", url, "--control-listen", "127.0.0.1:0"]
        self.collector = Process("services.collector", arguments, home / "collector.log")
        self.acknowledged: dict[str, str] = {}
        self.attempts = 0

    def close(self) -> None:
        self.collector.kill()
        self.log.close()
        self.broker.kill()

    def submit(self, feedback: Feedback, release: Release | None) -> None:
        """As an application does: again, with the same key, for as long as the collector is away."""
        request: Any = SubmitFeedbackRequest(feedback=feedback)
        answer: Any = SubmitFeedbackResponse
        if release is not None:
            request, answer = release.convert(request), release.of(SubmitFeedbackResponse)
        deadline = time.monotonic() + SECONDS
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]
        with grpc.insecure_channel(self.collector.address, options=options) as channel:
            call = channel.unary_unary(
                "/thumbwheel.v1.PreferenceService/SubmitFeedback",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            while True:
                self.attempts += 1
                try:
                    self.acknowledged[feedback.idempotency_key] = call(
                        request, timeout=10.0, wait_for_ready=True
                    ).feedback_id
                    return
                except grpc.RpcError as error:
                    if error.code() not in PASSING or time.monotonic() > deadline:
                        raise

    def publish(self, event: GenerationEvent, release: Release | None) -> None:
        """As a policy does."""
        producer = self.log.producer()
        message = event if release is None else release.convert(event)
        producer.send(topics.GENERATIONS, event.generation.prompt_id.encode(), message.SerializeToString()).result(
            SECONDS
        )
        producer.close(SECONDS)

    def read(self, kind: Callable[[bytes], Any], enough: Callable[[list[Any]], bool]) -> list[Any]:
        """As a trainer does: every comparison, once there are enough."""
        deadline, consumer = time.monotonic() + SECONDS, self.log.consumer([topics.COMPARISONS], group="t")
        found: list[Any] = []
        while not enough(found):
            assert time.monotonic() < deadline, f"{len(found)} only"
            found += [kind(record.value) for record in consumer.poll(0.2)]
        consumer.close()
        return found


@pytest.fixture
def world(tmp_path: Path, url: str) -> Iterator[World]:
    world = World(tmp_path, url)
    yield world
    world.close()


def _at(url: str, revision: str) -> None:
    """The database as the release before left it."""
    engine = create_engine(url)
    with engine.connect() as connection:
        migrate(connection)
        migrate(connection, down_to=revision)
    engine.dispose()


@pytest.mark.timeout(240)
def test_nothing_is_lost_while_releases_are_mixed(world: World, url: str) -> None:
    _at(url, OLD_SCHEMA)
    world.collector.start().wait_serving()  # the upgrade of the schema, before the first call
    pairs = [world.deployment.pair(f"a {i}", f"b {i}") for i in range(VOTES)]
    votes = [parts.comparison(*pair, user=f"user-{i}") for i, pair in enumerate(pairs)]
    releases = [BEFORE if i % 2 else None for i in range(VOTES)]
    rolled, failures = threading.Event(), []

    def load(mine: range) -> None:
        try:
            for i in mine:
                for event in pairs[i]:
                    # The policies are upgraded on their own: every third policy is of the other release than the app.
                    world.publish(event, releases[i] if i % 3 else (None if releases[i] else BEFORE))
                world.submit(votes[i], releases[i])
                if i >= VOTES // 2:
                    rolled.wait(SECONDS)  # the second half comes while it is away, and after
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=load, args=(range(k, VOTES, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    _wait(lambda: len(world.acknowledged) >= VOTES // 4)
    assert world.collector.stop() == 0  # a rolling upgrade: drained, and another in its place
    world.collector.start().wait_serving()
    rolled.set()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    assert len(world.acknowledged) == VOTES

    def all_there(found: list[Any]) -> bool:
        return {id for event in found for id in event.feedback_ids} >= set(world.acknowledged.values())

    new = world.read(ComparisonEvent.FromString, all_there)
    old = world.read(BEFORE.of(ComparisonEvent).FromString, all_there)
    by_id = {event.comparison_id: event for event in new}
    assert len(by_id) == VOTES  # none twice
    assert {event.comparison_id for event in old} == by_id.keys()
    for event in old:
        twin = by_id[event.comparison_id]
        assert (event.chosen.text, event.rejected.text, list(event.chosen.token_ids)) == (
            twin.chosen.text,
            twin.rejected.text,
            list(twin.chosen.token_ids),
        )
    assert {event.chosen.text for event in new} == {f"a {i}" for i in range(VOTES)}


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _rows(connection: Connection, columns: dict[str, list[str]]) -> dict[str, list[tuple[object, ...]]]:
    found = {}
    for name, wanted in columns.items():
        table = tables.metadata.tables[name]
        rows = connection.execute(select(*(table.c[column] for column in wanted))).all()
        found[name] = sorted((tuple(row) for row in rows), key=repr)
    connection.rollback()
    return found


@pytest.mark.parametrize("revision", ["0002", "0001"])
async def test_the_schema_goes_back_and_forth_and_keeps_what_both_know(
    url: str,
    tmp_path: Path,
    revision: str,
) -> None:
    deployment, database = Deployment.at(tmp_path), Database(url)
    for i in range(12):
        a, b = deployment.pair(f"a {i}", f"b {i}")
        await store(database, a, b)
        for feedback in (parts.comparison(a, b, user=f"u{i}"), parts.edit(b, f"better {i}"), parts.comment(a, "hm")):
            await deployment.submit(database, feedback)
    database.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        migrate(connection, down_to=revision)
        known = {
            name: [column["name"] for column in inspect(connection).get_columns(name)]
            for name in inspect(connection).get_table_names()
            if name in tables.metadata.tables
        }
        connection.rollback()
        migrate(connection)
        common = {name: [c for c in columns if c in tables.metadata.tables[name].c] for name, columns in known.items()}
        first = _rows(connection, common)
        assert len(first["feedback"]) == 36
        assert len(first["generations"]) == 24
        migrate(connection, down_to=revision)
        migrate(connection)
        assert _rows(connection, common) == first
    engine.dispose()
    again = Database(url)  # and it goes on as any
    a, b = deployment.pair("x", "y")
    await store(again, a, b)
    assert (await deployment.submit(again, parts.comparison(a, b))).changed
    again.close()


def test_the_release_before_lacks_what_this_one_has() -> None:
    """Or the test above would mix nothing."""
    new = {field.name for field in GenerationEvent.DESCRIPTOR.fields}
    old = {field.name for field in BEFORE.descriptors["thumbwheel.v1.GenerationEvent"].fields}
    assert old < new
