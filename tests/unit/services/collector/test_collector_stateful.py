"""Anything in any order, against a model that fits on a page: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from services.collector import ledger, outbox
from services.collector.database import Database
from services.collector.relay import Relay
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import BOTH_BAD, TIE, A, B, Deployment, eventually
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonState, GenerationEvent
from thumbwheel.v1.preference_pb2 import Feedback, FeedbackState, Preference

T = TypeVar("T")

Pair = tuple[GenerationEvent, GenerationEvent]


@dataclass
class Expected:
    """What the model knows of a piece of feedback."""

    feedback: Feedback
    pair: Pair
    id: str
    retracted: bool = False
    emitted: bool = False

    def state(self, arrived: set[str]) -> FeedbackState.ValueType:
        """The state it must be in."""
        if self.retracted:
            return FeedbackState.FEEDBACK_STATE_RETRACTED
        if not all(event.event_id in arrived for event in self.pair):
            return FeedbackState.FEEDBACK_STATE_HELD
        decided = self.feedback.comparison.preference in (A, B)
        return FeedbackState.FEEDBACK_STATE_ACCEPTED if decided else FeedbackState.FEEDBACK_STATE_APART


class Collector(RuleBasedStateMachine):
    """Drives the record, the outbox and the relay; the process may end at any time, the broker too."""

    pairs: Bundle[Pair] = Bundle("pairs")
    keys: Bundle[str] = Bundle("keys")

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.deployment = Deployment(ReceiptKey("test", bytes(32)))
        self.database = Database(parts.settings(self.home).database_url)
        self.log = MemoryLog()
        self.expected: dict[str, Expected] = {}
        self.arrived: set[str] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 30))

    @rule(target=pairs)
    def ask(self) -> Pair:
        return self.deployment.pair()

    @rule(target=keys, pair=pairs, preference=st.sampled_from([A, B, TIE, BOTH_BAD]))
    def submit(self, pair: Pair, preference: Preference.ValueType) -> str:
        feedback = parts.comparison(*pair, preference)
        recorded = self.run(self.deployment.submit(self.database, feedback))
        assert recorded.changed
        expected = Expected(feedback, pair, recorded.record.feedback_id)
        self.expected[feedback.idempotency_key] = expected
        self.note_emitted()
        return feedback.idempotency_key

    @rule(key=keys)
    def submit_again(self, key: str) -> None:
        recorded = self.run(self.deployment.submit(self.database, self.expected[key].feedback))
        assert not recorded.changed
        assert recorded.record.feedback_id == self.expected[key].id

    @rule(key=keys, pair=pairs)
    def submit_other_content(self, key: str, pair: Pair) -> None:
        other = parts.comparison(*pair, A, key=key, user="bob")
        try:
            self.run(self.deployment.submit(self.database, other))
        except errors.Conflict:
            return
        raise AssertionError("taken twice")

    @rule(pair=pairs, which=st.sampled_from([(0,), (1,), (0, 1)]))
    def generations_arrive(self, pair: Pair, which: tuple[int, ...]) -> None:
        events = [pair[i] for i in which]
        self.run(self.database.write(partial(ledger.store, events=events)))
        self.arrived.update(event.event_id for event in events)
        self.note_emitted()

    @rule(key=keys)
    def retract(self, key: str) -> None:
        expected = self.expected[key]
        work = partial(ledger.retract, feedback_id=expected.id, user_id="ann", tenant="default")
        assert self.run(self.database.write(work)).changed is not expected.retracted
        expected.retracted = True

    @rule()
    def process_ends_and_starts_again(self) -> None:
        self.database.close()
        self.database = Database(parts.settings(self.home).database_url)

    @rule()
    def relay_runs(self) -> None:
        self.run(self.publish())

    @rule()
    def broker_loses_everything(self) -> None:
        self.log.lose()

    @invariant()
    def every_record_stands_where_it_should(self) -> None:
        expected = list(self.expected.values())
        find = partial(ledger.find, feedback_ids=[one.id for one in expected], tenant="default")
        found = self.run(self.database.read(find))
        assert [record.state for record in found] == [one.state(self.arrived) for one in expected]

    def teardown(self) -> None:
        if not hasattr(self, "database"):
            return
        try:
            self.run(self.publish())
            self.everything_is_on_the_topics()
        finally:
            self.database.close()
            self.log.close()
            self.runner.close()
            shutil.rmtree(self.home)

    def note_emitted(self) -> None:
        for one in self.expected.values():
            one.emitted |= one.state(self.arrived) == FeedbackState.FEEDBACK_STATE_ACCEPTED

    async def publish(self) -> None:
        relay = Relay(self.database, self.log, parts.settings(self.home))
        task = asyncio.create_task(relay.run())

        async def settled() -> bool:
            levels = await self.database.read(outbox.levels)
            return task.done() or (levels.unpublished == 0 and relay.settled)

        try:
            await eventually(settled, bool)
        finally:
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled(), task.exception()

    def everything_is_on_the_topics(self) -> None:
        records = self.log.records(topics.COMPARISONS)
        events = {event.event_id: event for event in parts.comparisons(records)}.values()
        accepted = [event for event in events if event.state == ComparisonState.COMPARISON_STATE_ACCEPTED]
        retracted = [event for event in events if event.state == ComparisonState.COMPARISON_STATE_RETRACTED]
        emitted = {one.id for one in self.expected.values() if one.emitted}
        taken_back = {one.id for one in self.expected.values() if one.emitted and one.retracted}
        assert sorted(event.feedback_ids[0] for event in accepted) == sorted(emitted)
        assert sorted(event.feedback_ids[0] for event in retracted) == sorted(taken_back)
        ids = {event.feedback_ids[0]: event.comparison_id for event in accepted}
        assert len(set(ids.values())) == len(ids)
        for event in retracted:
            assert event.comparison_id == ids[event.feedback_ids[0]]
        told = parts.feedback_events(self.log.records(topics.FEEDBACK))
        latest = {event.record.feedback_id: event.record.state for event in told}
        assert latest == {one.id: one.state(self.arrived) for one in self.expected.values()}


TestCollector = Collector.TestCase
TestCollector.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
