"""What NextComparison picks: every pair as often as its propensity says, in both orders alike, and never twice."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.collector import picking
from services.collector.asking import Asking
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.picked import Pair
from services.collector.picking import Eligible, pick, probabilities
from services.collector.rules import Shares
from services.collector.service import reward_service
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment, store
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import NextComparisonResponse, PickStrategy
from thumbwheel.v1.reward_pb2 import CompareRequest, CompareResponse
from thumbwheel.v1.reward_pb2_grpc import (
    RewardServiceServicer,
    add_RewardServiceServicer_to_server,
)

PAIRS = [Eligible(Pair(f"a{i}", f"b{i}"), duel=i < 2) for i in range(5)]
UNSURE = {one.pair: 0.1 / (1 + abs(i - 3)) for i, one in enumerate(PAIRS)}


def test_each_strategy_adds_its_share() -> None:
    found = probabilities(PAIRS, Shares(random=0.2, duel=0.4), UNSURE)
    totals = [sum(found[one.pair].values()) for one in PAIRS]
    assert totals == pytest.approx([0.04 + 0.2, 0.04 + 0.2, 0.04, 0.04 + 0.4, 0.04])
    without = probabilities(PAIRS, Shares(0.2, 0.4), {})
    assert [sum(without[one.pair].values()) for one in PAIRS] == pytest.approx([0.44, 0.44, 0.04, 0.04, 0.04])
    no_duels = probabilities(PAIRS[2:], Shares(0.2, 0.4), {one.pair: UNSURE[one.pair] for one in PAIRS[2:]})
    assert [sum(no_duels[one.pair].values()) for one in PAIRS[2:]] == pytest.approx([0.2 / 3, 0.2 / 3 + 0.8, 0.2 / 3])
    chance = probabilities(PAIRS[2:], Shares(0.2, 0.4), {})
    assert [sum(chance[one.pair].values()) for one in PAIRS[2:]] == pytest.approx([1 / 3] * 3)


@given(
    duels=st.lists(st.booleans(), min_size=1, max_size=8),
    scored=st.booleans(),
    chance=st.floats(0.05, 1.0),
    duel=st.floats(0.0, 1.0),
)
def test_propensities_add_up_to_one_and_nothing_is_impossible(
    duels: list[bool], scored: bool, chance: float, duel: float
) -> None:
    pairs = [Eligible(Pair(f"a{i}", f"b{i}"), one) for i, one in enumerate(duels)]
    unsure = {one.pair: 0.1 * (1 + i) for i, one in enumerate(pairs)} if scored else {}
    found = probabilities(pairs, Shares(chance, min(duel, 1.0 - chance)), unsure)
    totals = [sum(by.values()) for by in found.values()]
    assert len(totals) == len(pairs)
    assert sum(totals) == pytest.approx(1.0)
    assert min(totals) > 0


def test_pairs_come_as_often_as_their_propensity_says() -> None:
    """20,000 seeded draws: each ordered pair within four standard errors of the propensity it came with."""
    draw, count = random.Random(7), 20_000
    found = probabilities(PAIRS, Shares(0.2, 0.4), UNSURE)
    picks = [pick(found, draw) for _ in range(count)]
    said = {one.pair: one.propensity for one in picks}
    assert len(said) == 2 * len(PAIRS)
    assert sum(said.values()) == pytest.approx(1.0)
    for pair, times in Counter(one.pair for one in picks).items():
        p = said[pair]
        assert abs(times / count - p) < 4 * math.sqrt(p * (1 - p) / count), pair
    by_chance = sum(one.strategy == picking.RANDOM for one in picks) / count
    assert abs(by_chance - 0.2) < 4 * math.sqrt(0.16 / count)


async def test_only_what_a_user_has_not_seen_and_can_tell_apart_is_eligible(
    database: Database, deployment: Deployment
) -> None:
    prompt_id = parts.new_id()
    texts = ["one", "two", "one", "  "]
    same = [deployment.generation(text, prompt_id) for text in texts]
    same[1].generation.spans[0].version = "policy-000002"
    alone = deployment.generation("alone")
    await store(database, *same, alone)
    eligible = partial(picking.eligible, tenant="default", user_id="ann", window=100)
    found = await database.read(eligible)
    ids = {frozenset(one.pair) for one in found}
    assert ids == {frozenset((same[0].event_id, same[1].event_id)), frozenset((same[1].event_id, same[2].event_id))}
    assert all(one.duel for one in found), "they come from different versions"
    await deployment.submit(database, parts.comparison(same[0], same[1]))
    assert [set(one.pair) for one in await database.read(eligible)] == [{same[1].event_id, same[2].event_id}]
    other = partial(picking.eligible, tenant="other", user_id="ann", window=100)
    assert await database.read(other) == []


class Rewards(RewardServiceServicer):
    """A reward service that prefers the longer response, the more so the longer it is, as its ensemble is then the more
    divided.
    """

    ensemble = True
    speechless = -1
    """Answers with an error where the responses differ by so much in length."""
    away = False
    keys: ClassVar[set[str]] = set()

    async def Compare(self, request: CompareRequest, context: grpc.aio.ServicerContext[Any, Any]) -> CompareResponse:
        longer = len(request.response_a) - len(request.response_b)
        if self.away or abs(longer) == self.speechless:
            raise RuntimeError("away")
        self.keys.update(str(value) for key, value in context.invocation_metadata() or () if key == "authorization")
        answer = CompareResponse(probability_a=1 / (1 + math.exp(-longer)), version="r")
        if self.ensemble:
            answer.uncertainty = 0.01 * abs(longer)
        return answer


@pytest.fixture
async def rewards() -> AsyncIterator[tuple[Rewards, str]]:
    """The service, and where it is."""
    server, rewards = grpc.aio.server(), Rewards()  # type: ignore[abstract]  # what is not asked is not there
    add_RewardServiceServicer_to_server(rewards, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield rewards, f"127.0.0.1:{port}"
    await server.stop(None)


def of(response: NextComparisonResponse) -> set[str]:
    """Which two."""
    return {response.a.generation_id, response.b.generation_id}


async def test_what_the_ensemble_differs_on_is_picked_and_else_what_is_closest_to_a_half(
    database: Database, deployment: Deployment, tmp_path: Path, rewards: tuple[Rewards, str]
) -> None:
    """It differs most on the pairs that are furthest from 1/2."""
    service, address = rewards
    pairs = {gap: deployment.pair("short", "short" + "!" * gap) for gap in (4, 1, 9)}
    ids = {gap: {event.event_id for event in pair} for gap, pair in pairs.items()}
    await store(database, *(event for pair in pairs.values() for event in pair))
    async with reward_service(CollectorSettings(home=tmp_path, reward=address)) as (reward, metadata):
        asking = Asking(database, reward, metadata, Shares(0.0, 0.0), draw=random.Random(0))
        assert of(await asking.next("default", "ann")) == ids[9]
        service.speechless = 9
        assert of(await asking.next("default", "bob")) == ids[4], "the most of what was answered"
        service.speechless, service.ensemble = -1, False
        assert of(await asking.next("default", "eve")) == ids[1]


async def test_the_reward_model_is_asked_over_grpc_and_done_without(
    database: Database,
    deployment: Deployment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewards: tuple[Rewards, str],
) -> None:
    service, address = rewards
    pairs = [deployment.pair("short", "short" + "!" * gap) for gap in (4, 9, 1)]
    await store(database, *(event for pair in pairs for event in pair))
    monkeypatch.setenv("THUMBWHEEL_API_KEY", "tw_secret")
    async with reward_service(CollectorSettings(home=tmp_path, reward=address)) as (reward, metadata):
        asking = Asking(database, reward, metadata, Shares(0.01, 0.0), draw=random.Random(0))
        first = await asking.next("default", "ann")
        assert first.strategy == PickStrategy.PICK_STRATEGY_UNCERTAIN
        assert of(first) == {event.event_id for event in pairs[1]}
        assert first.propensity == pytest.approx((0.99 + 0.01 / 3) / 2)
        assert service.keys == {"Bearer tw_secret"}
        service.away = True
        second = await asking.next("default", "ann")
        assert second.strategy == PickStrategy.PICK_STRATEGY_RANDOM
        assert second.propensity == pytest.approx(1 / 4)
        await asking.next("default", "ann")
        with pytest.raises(errors.NotFound, match="'ann' has not seen"):
            await asking.next("default", "ann")
