"""Which version a server serves, for what the topic says, what the store has and what comes of the swaps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uuid_utils
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services import versions
from services.versions import Follower, newest_verified, pinned
from tests.support import until
from tests.unit.checkpoints.test_held import WEIGHTS, Home
from thumbwheel import errors, tracing
from thumbwheel.checkpoints.held import HeldVersions
from thumbwheel.checkpoints.store import VerifiedVersion, version_name
from thumbwheel.stream import topics
from thumbwheel.stream.log import Headers, Log, Producer
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import VersionEvent
from thumbwheel.v1.policy_pb2 import Swap, SwapOutcome
from thumbwheel.v1.rollout_pb2 import ModelRole, VersionState

POLICY = ModelRole.MODEL_ROLE_POLICY
STABLE, ROLLED_BACK = VersionState.VERSION_STATE_STABLE, VersionState.VERSION_STATE_ROLLED_BACK


@dataclass
class FakeEngine:
    """Does as the follower says, but for the versions that it refuses."""

    live: VerifiedVersion
    previous: VerifiedVersion | None = None
    refuses: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    suspects: str = ""

    @property
    def suspect(self) -> bool:
        return self.version == self.suspects

    @property
    def version(self) -> str:
        return self.live.manifest.version

    async def swap(self, target: VerifiedVersion) -> Swap:
        self.asked.append(target.manifest.version)
        if target.manifest.version in self.refuses:
            return Swap(outcome=SwapOutcome.SWAP_OUTCOME_ROLLED_BACK, error="it computes something else")
        self.live, self.previous = target, self.live
        return Swap(outcome=SwapOutcome.SWAP_OUTCOME_LIVE)

    async def rollback(self) -> Swap:
        assert self.previous is not None
        self.asked.append("rollback")
        self.live, self.previous = self.previous, None
        return Swap(outcome=SwapOutcome.SWAP_OUTCOME_LIVE)


@dataclass
class World:
    """A store with six versions, a follower, and its engine on version 1."""

    home: Home
    held: HeldVersions
    engine: FakeEngine
    producer: Producer
    digests: dict[str, str]

    def say(
        self,
        sequence: int,
        state: VersionState.ValueType = STABLE,
        role: ModelRole.ValueType = POLICY,
        *,
        clicked_at: Sequence[float] = (),
        headers: Headers = (),
    ) -> None:
        """Announces where a version stands."""
        name = version_name(POLICY, sequence)
        event = VersionEvent(event_id=str(uuid_utils.uuid7()), version=name, role=role, state=state, sequence=sequence)
        event.manifest_sha256 = self.digests.get(name, "")
        for at in clicked_at:
            event.learnt_received_at.add().FromMicroseconds(round(at * 1e6))
        self.producer.send(topics.VERSIONS, name.encode(), event.SerializeToString(), headers).result(5)

    async def live(self, sequence: int) -> None:
        """Waits until a version is live."""

        async def is_live() -> bool:
            return self.engine.version == version_name(POLICY, sequence)

        await until(is_live, timeout=10, every=0.01)


@asynccontextmanager
async def following(folder: Path) -> AsyncIterator[World]:
    home = Home(folder)
    digests = {name: home.store.load(name).manifest_sha256 for name in (home.publish(i) for i in range(6))}
    log: Log = MemoryLog()
    log.ensure_topics(topics.topics(partitions=1, replication=1), 5.0)
    held = home.held()
    engine: Any = FakeEngine(held.fetch("policy-000001", timeout=10))
    follower = Follower(log=log, held=held, engine=engine, role=POLICY, process="policy", fetch_seconds=10.0)
    task = asyncio.create_task(follower.run())
    try:
        yield World(home, held, engine, log.producer(), digests)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_the_newest_stable_version_goes_live(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.say(0)
        world.say(5, state=VersionState.VERSION_STATE_CANARY)
        world.say(4, role=ModelRole.MODEL_ROLE_REWARD)
        world.say(2)
        await world.live(2)
        world.say(3)
        await world.live(3)
        assert world.engine.asked[-1] == "policy-000003"
        assert world.engine.live.path.is_relative_to(world.held.folder)

        async def tidied() -> bool:
            return world.held.left_here() == ["policy-000003", "policy-000002"]

        await until(tidied, timeout=10, every=0.01)


def _clicks_live() -> tuple[float, float]:
    """How many clicks were seen to go live, and how long all of them took together."""
    [metric] = versions.CLICK_TO_LIVE.collect()
    found = {s.name.rpartition("_")[2]: s.value for s in metric.samples if s.labels == {"role": "policy"}}
    return found.get("count", 0.0), found.get("sum", 0.0)


async def test_a_click_is_live_with_the_first_version_served_that_learnt_it(tmp_path: Path) -> None:
    count, total = _clicks_live()
    clicked = time.time() - 100.0
    async with following(tmp_path) as world:
        world.engine.refuses.add("policy-000003")
        world.say(1, clicked_at=[clicked])  # it is live already
        world.say(2, clicked_at=[clicked] * 2)
        await world.live(2)
        assert _clicks_live()[0] == count + 2
        world.say(3, clicked_at=[clicked] * 3)  # is refused, and version 4 goes on from it
        await until(lambda: asyncio.sleep(0, "policy-000003" in world.engine.asked), timeout=10, every=0.01)
        assert _clicks_live()[0] == count + 2
        world.say(4, clicked_at=[clicked])
        await world.live(4)
        world.say(4, ROLLED_BACK)
        await world.live(2)
        world.say(5)
        await world.live(5)
    assert _clicks_live()[0] == count + 6
    assert 600.0 <= _clicks_live()[1] - total < 660.0


async def test_going_live_is_of_the_trace_of_the_announcement(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    with tracing.span("trainer.publish"):
        headers = tracing.headers()
    async with following(tmp_path) as world:
        world.say(2, headers=headers)
        await world.live(2)
    publish, version = spans.get_finished_spans()
    assert version.parent is not None
    assert publish.context is not None
    assert (version.name, version.attributes) == ("version", {"version": "policy-000002"})
    assert version.parent.span_id == publish.context.span_id


async def test_a_version_that_is_rolled_back_gives_way_to_the_best_that_stands(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        for sequence in (2, 3, 4):
            world.say(sequence)
            await world.live(sequence)
        world.say(3, ROLLED_BACK)
        world.say(4, ROLLED_BACK)
        await world.live(2)
        world.say(5)
        await world.live(5)
        assert "rollback" not in world.engine.asked


async def test_with_no_word_of_another_the_version_before_comes_back(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.say(2)
        await world.live(2)
        world.say(2, ROLLED_BACK)
        await world.live(1)
        assert world.engine.asked == ["policy-000002", "rollback"]


async def test_a_start_on_a_version_that_does_not_reproduce_its_probe_is_left_behind(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.engine.suspects = "policy-000001"
        world.engine.refuses = {"policy-000001"}
        world.say(1)
        world.say(0)
        await world.live(0)
        world.say(2)
        await world.live(2)


async def test_what_is_refused_is_not_tried_again_unless_it_is_announced_again(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.engine.refuses = {"policy-000003"}
        world.say(3)
        world.say(2)
        await world.live(2)
        world.say(0)
        world.say(4)
        await world.live(4)
        assert world.engine.asked.count("policy-000003") == 1
        world.engine.refuses = {"policy-000005"}
        world.say(5)

        async def asked() -> bool:
            return world.engine.asked[-1] == "policy-000005"

        await until(asked, timeout=10, every=0.01)
        world.engine.refuses.clear()
        world.say(5)
        await world.live(5)


async def test_a_corrupt_version_is_passed_over(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.home.damage("policy-000003", WEIGHTS, b"torn")
        world.home.damage("policy-000003", WEIGHTS + ".delta", None)
        world.digests["policy-000004"] = "0" * 64
        for sequence in (4, 3, 2):
            world.say(sequence)
        await world.live(2)
        world.say(5)
        await world.live(5)
        assert world.engine.asked[-1] == "policy-000005"
        assert not {"policy-000003", "policy-000004"} & set(world.engine.asked)


async def test_a_store_that_is_away_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "FIRST_RETRY_SECONDS", 0.02)
    async with following(tmp_path) as world:
        away = tmp_path / "away"
        world.home.store.root.rename(away)
        deferred = versions.DEFERRED._value.get()
        world.say(2)

        async def tried_twice() -> bool:
            return bool(versions.DEFERRED._value.get() >= deferred + 2)

        await until(tried_twice, timeout=10, every=0.01)
        assert world.engine.asked == []
        away.rename(world.home.store.root)
        await world.live(2)


async def test_one_that_never_comes_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async with following(tmp_path) as world:
        world.say(9)
        world.say(2)
        await world.live(2)
        world.say(3)
        await world.live(3)


def test_a_server_starts_on_the_newest_that_verifies(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for sequence in range(3):
        home.publish(sequence, with_delta=False)
    home.damage("policy-000002", WEIGHTS, b"torn")
    held = home.held()
    assert newest_verified(home.store, held, POLICY, process="policy", timeout=10).manifest.sequence == 1
    held.close()


def test_a_server_starts_without_its_store(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.publish(0)
    held = home.held()
    held.fetch("policy-000000", timeout=10)
    held.close()
    home.store.root.rename(tmp_path / "away")
    again = home.held()
    assert newest_verified(home.store, again, POLICY, process="policy", timeout=10).manifest.sequence == 0
    again.keep_only(())
    with pytest.raises(errors.MissingModel, match="policy has no model to serve"):
        newest_verified(home.store, again, POLICY, process="policy", timeout=10)


def test_the_version_that_is_asked_for_is_served_and_no_other(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for sequence in range(3):
        home.publish(sequence, with_delta=False)
    held = home.held()
    assert pinned(held, POLICY, "policy-000001", timeout=10).manifest.sequence == 1
    with pytest.raises(errors.InvalidArgument, match=r"serve_version: is policy-000001, which is for another role"):
        pinned(held, ModelRole.MODEL_ROLE_REWARD, "policy-000001", timeout=10)
    with pytest.raises(errors.Unavailable, match="policy-000007"):
        pinned(held, POLICY, "policy-000007", timeout=10)
    held.close()
