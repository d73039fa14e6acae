"""Anything in any order, against a model that fits on a page: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from services.collector import ledger, outbox, raters, records
from services.collector.curation import RaterId
from services.collector.database import Database
from services.collector.relay import Relay
from services.collector.rules import Rules
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import BOTH_BAD, TIE, A, B, Deployment, eventually
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, GenerationEvent
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
    withdrawn: bool = False
    """A later judgement of the same pair was retracted, and this one with it."""

    @property
    def preference(self) -> Preference.ValueType:
        return self.feedback.comparison.preference

    @property
    def item(self) -> tuple[str, str, str]:
        a, b = self.pair
        return self.feedback.user_id, a.event_id, b.event_id


class Collector(RuleBasedStateMachine):
    """Drives the record, the outbox and the relay; the process may end at any time, the broker too."""

    pairs: Bundle[Pair] = Bundle("pairs")
    keys: Bundle[str] = Bundle("keys")

    @initialize(target=pairs)
    def start(self) -> MultipleResults[Pair]:
        """One pair whose responses have arrived, and one whose have not."""
        self.home = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.deployment = Deployment(ReceiptKey("test", bytes(32)))
        self.database = Database(parts.settings(self.home).database_url)
        self.log = MemoryLog()
        self.expected: dict[str, Expected] = {}
        self.arrived: set[str] = set()
        self.quarantined: set[str] = set()
        here, late = self.deployment.pair(), self.deployment.pair()
        self.arrive(here)
        return multiple(here, late)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 30))

    @rule(target=pairs)
    def ask(self) -> Pair:
        return self.deployment.pair()

    @rule(
        target=keys,
        pair=pairs,
        preference=st.sampled_from([A, B, TIE, BOTH_BAD]),
        user=st.sampled_from(["ann", "bob", "cyd"]),
    )
    def submit(self, pair: Pair, preference: Preference.ValueType, user: str) -> str:
        feedback = parts.comparison(*pair, preference, user=user)
        recorded = self.run(self.deployment.submit(self.database, feedback))
        assert recorded.changed
        self.expected[feedback.idempotency_key] = Expected(feedback, pair, recorded.record.feedback_id)
        return feedback.idempotency_key

    @rule(key=keys)
    def submit_again(self, key: str) -> None:
        recorded = self.run(self.deployment.submit(self.database, self.expected[key].feedback))
        assert not recorded.changed
        assert recorded.record.feedback_id == self.expected[key].id

    @rule(key=keys, pair=pairs)
    def submit_other_content(self, key: str, pair: Pair) -> None:
        other = parts.comparison(*pair, A, key=key, user="dan")
        try:
            self.run(self.deployment.submit(self.database, other))
        except errors.Conflict:
            return
        raise AssertionError("taken twice")

    @rule(pair=pairs, which=st.sampled_from([(0,), (1,), (0, 1)]))
    def generations_arrive(self, pair: Pair, which: tuple[int, ...]) -> None:
        self.arrive([pair[i] for i in which])

    def arrive(self, events: Sequence[GenerationEvent]) -> None:
        self.run(parts.store(self.database, *events))
        self.arrived.update(event.event_id for event in events)

    @rule(key=keys)
    def retract(self, key: str) -> None:
        expected = self.expected[key]
        user = expected.feedback.user_id
        changed = self.run(parts.retract(self.database, expected.id, user)).changed
        assert changed is not expected.retracted
        if changed:
            expected.retracted = True
            for other in self.expected.values():
                other.withdrawn |= other.item == expected.item and other.id < expected.id

    @rule(user=st.sampled_from(["ann", "bob"]), state=st.sampled_from(["QUARANTINED", ""]))
    def operator_says(self, user: str, state: str) -> None:
        self.run(raters.quarantine(self.database, Rules(), RaterId("default", user), state, lambda: None))
        (self.quarantined.add if state else self.quarantined.discard)(user)

    @rule()
    def raters_are_assessed(self) -> None:
        self.run(raters.Assessor(self.database, Rules(), 1.0, lambda: None).once())

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

    def states(self) -> dict[str, str]:
        """The state that each piece of feedback must be in: a second, slower way to come to it."""
        found: dict[str, str] = {}
        standing: dict[tuple[str, str, str], Expected] = {}
        for one in self.expected.values():
            if one.retracted:
                found[one.id] = "RETRACTED"
            elif one.withdrawn:
                found[one.id] = "SUPERSEDED"
            elif not all(event.event_id in self.arrived for event in one.pair):
                found[one.id] = "HELD"
            else:
                if one.item in standing:
                    found[standing[one.item].id] = "SUPERSEDED"
                standing[one.item] = one
        balance: dict[tuple[str, str], int] = {}
        counted = [one for one in standing.values() if one.feedback.user_id not in self.quarantined]
        for one in counted:
            sign = {A: 1, B: -1}.get(one.preference, 0)
            balance[one.item[1:]] = balance.get(one.item[1:], 0) + sign
        for one in standing.values():
            if one.feedback.user_id in self.quarantined:
                found[one.id] = "QUARANTINED"
                continue
            sign = {A: 1, B: -1}.get(one.preference, 0)
            found[one.id] = "ACCEPTED" if sign * balance[one.item[1:]] > 0 else "APART"
        return found

    @invariant()
    def every_record_stands_where_it_should(self) -> None:
        expected = self.states()
        ids = [one.id for one in self.expected.values()]
        found = self.run(self.database.read(partial(ledger.find, feedback_ids=ids, tenant="default")))
        assert {r.feedback_id: records.name_of(r.state) for r in found} == expected
        assert all((r.weight > 0) is (r.state == FeedbackState.FEEDBACK_STATE_ACCEPTED) for r in found)

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
        """Whoever reads the topics from their start comes to know what the record says."""
        learnt: dict[str, ComparisonEvent] = {}
        revisions: dict[str, int] = {}
        for event in parts.comparisons(self.log.records(topics.COMPARISONS)):
            if event.revision <= revisions.get(event.comparison_id, 0):
                continue
            assert event.revision == revisions.get(event.comparison_id, 0) + 1, "none is missing"
            revisions[event.comparison_id] = event.revision
            if event.state == ComparisonState.COMPARISON_STATE_ACCEPTED:
                learnt[event.comparison_id] = event
            else:
                del learnt[event.comparison_id]
        states = self.states()
        by_outcome = {(one.item, one.preference) for one in self.expected.values() if states[one.id] == "ACCEPTED"}
        votes = {one.id: (one.item, one.preference) for one in self.expected.values()}
        assert sorted(votes[event.feedback_ids[0]] for event in learnt.values()) == sorted(by_outcome)
        told = parts.feedback_events(self.log.records(topics.FEEDBACK))
        latest = {event.record.feedback_id: records.name_of(event.record.state) for event in told}
        assert latest == states
        assert len({event.event_id for event in told}) == len({event.SerializeToString() for event in told})


TestCollector = Collector.TestCase
TestCollector.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
