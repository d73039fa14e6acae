"""The real collector and a real broker: what was acknowledged arrives, whoever dies when."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from tests.support import Process, free_port, stopped
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log, Record
from thumbwheel.v1 import preference_pb2_grpc
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, DeadLetter, GenerationEvent
from thumbwheel.v1.preference_pb2 import (
    Feedback,
    FeedbackRecord,
    FeedbackState,
    GetFeedbackRequest,
    RetractRequest,
    SubmitFeedbackRequest,
    SubmitFeedbackResponse,
)

SECONDS = 30.0


class Stack:
    """A broker and a collector that can be ended in any way, and their client."""

    def __init__(self, home: Path, url: str) -> None:
        self.deployment = Deployment.at(home)
        self.broker = EmbeddedBroker(port=free_port(), log=home / "broker.log")
        self.log: Log = open_log(self.broker.bootstrap_servers)
        arguments = ["--home", str(home), "--bootstrap-servers", self.broker.bootstrap_servers]
        arguments += ["--control-listen", "127.0.0.1:0"]
        arguments += ["--database", url]
        self.collector = Process("services.collector", arguments, home / "collector.log")

    def start(self) -> None:
        """Starts the collector; returns when it serves."""
        self.collector.start().wait_serving()

    def close(self) -> None:
        self.collector.kill()
        self.log.close()
        self.broker.kill()

    def call(self, method: str, request: object) -> object:
        with grpc.insecure_channel(self.collector.address) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            return getattr(stub, method)(request, timeout=SECONDS, wait_for_ready=True)

    def submit(self, feedback: Feedback) -> SubmitFeedbackResponse:
        answer = self.call("SubmitFeedback", SubmitFeedbackRequest(feedback=feedback))
        assert isinstance(answer, SubmitFeedbackResponse)
        return answer

    def find(self, ids: Sequence[str]) -> list[FeedbackRecord]:
        answer = self.call("GetFeedback", GetFeedbackRequest(feedback_ids=ids))
        return list(answer.records)  # type: ignore[attr-defined]  # one stub for all methods

    def publish(self, *events: GenerationEvent) -> None:
        producer = self.log.producer()
        for event in events:
            producer.send(topics.GENERATIONS, event.generation.prompt_id.encode(), event.SerializeToString())
        producer.close(SECONDS)

    def wait_joined(self, ids: Sequence[str]) -> None:
        """Waits until nothing of this is held."""
        deadline = time.monotonic() + SECONDS
        while any(record.state == FeedbackState.FEEDBACK_STATE_HELD for record in self.find(ids)):
            assert time.monotonic() < deadline

    def read(self, topic: str, enough: Callable[[Sequence[Record]], bool]) -> list[Record]:
        """All records of a topic from its start, once they are enough."""
        deadline = time.monotonic() + SECONDS
        consumer = self.log.consumer([topic], group="test")
        records: list[Record] = []
        while not enough(records):
            assert time.monotonic() < deadline, f"{len(records)} records only"
            records += consumer.poll(0.2)
        records += consumer.poll(0.2)  # what there is too many of
        consumer.close()
        return records

    def comparisons(self, feedback_ids: set[str]) -> dict[str, ComparisonEvent]:
        """The comparisons on the topic by feedback, once all of these are there: none missing, none beyond, none in
        two versions.
        """

        def votes(records: Sequence[Record]) -> set[str]:
            return {id for event in parts.comparisons(list(records)) for id in event.feedback_ids}

        events = parts.comparisons(self.read(topics.COMPARISONS, lambda records: votes(records) >= feedback_ids))
        by_event = {event.event_id: event for event in events}
        accepted = [e for e in by_event.values() if e.state == ComparisonState.COMPARISON_STATE_ACCEPTED]
        assert sorted(id for event in accepted for id in event.feedback_ids) == sorted(feedback_ids)
        assert len({event.comparison_id for event in accepted}) == len(feedback_ids)
        return {event.feedback_ids[0]: event for event in accepted}


@pytest.fixture
def stack(tmp_path: Path, url: str) -> Iterator[Stack]:
    stack = Stack(tmp_path, url)
    yield stack
    stack.close()


def votes(stack: Stack, count: int) -> tuple[list[GenerationEvent], list[Feedback]]:
    """Pairs of candidates, and a comparison of each, by as many people."""
    pairs = [stack.deployment.pair(f"a {i}", f"b {i}") for i in range(count)]
    return [event for pair in pairs for event in pair], [
        parts.comparison(*pair, user=f"user-{i}") for i, pair in enumerate(pairs)
    ]


def test_killed_between_commit_and_publish(stack: Stack) -> None:
    stack.broker.start()
    stack.start()
    generations, feedback = votes(stack, 40)
    stack.publish(*generations)
    first = [stack.submit(one).feedback_id for one in feedback[:20]]
    stack.wait_joined(first)
    stack.comparisons(set(first))
    # From here the broker acknowledges nothing: what is committed cannot be published.
    with stopped(stack.broker.pid):
        acked = first + [stack.submit(one).feedback_id for one in feedback[20:]]
        stack.wait_joined(acked)
        states = {record.state for record in stack.find(acked[20:])}
        assert states == {FeedbackState.FEEDBACK_STATE_ACCEPTED}
        stack.collector.kill()
    stack.start()
    events = stack.comparisons(set(acked))
    for id, one in zip(acked, feedback, strict=True):
        again = stack.submit(one)
        assert (again.feedback_id, again.duplicate) == (id, True)
    assert {record.comparison_id for record in stack.find(acked)} == {e.comparison_id for e in events.values()}
    assert stack.collector.stop() == 0
    assert stack.collector.errors() == []


def test_the_broker_restarts_and_holds_all_again(stack: Stack) -> None:
    stack.broker.start()
    stack.start()
    generations, feedback = votes(stack, 30)
    stack.publish(*generations)
    acked = [stack.submit(one).feedback_id for one in feedback[:20]]
    stack.wait_joined(acked)
    before = stack.comparisons(set(acked))
    stack.broker.kill()
    acked += [stack.submit(one).feedback_id for one in feedback[20:]]
    stack.broker.start()
    after = stack.comparisons(set(acked))
    for id, event in before.items():
        assert after[id] == event
    retracted = stack.call("Retract", RetractRequest(feedback_id=acked[0], user_id="user-0"))
    assert retracted.record.state == FeedbackState.FEEDBACK_STATE_RETRACTED  # type: ignore[attr-defined]

    def taken_back(records: Sequence[Record]) -> bool:
        return any(
            (e.state, e.comparison_id) == (ComparisonState.COMPARISON_STATE_RETRACTED, after[acked[0]].comparison_id)
            for e in parts.comparisons(list(records))
        )

    stack.read(topics.COMPARISONS, taken_back)
    # Once more, with nothing to publish: it is noticed all the same.
    stack.broker.kill()
    stack.broker.start()
    assert stack.comparisons(set(acked)) == after
    assert stack.collector.stop() == 0


def test_killed_while_it_joins(stack: Stack) -> None:
    """Feedback comes first, then its generations, with a kill -9 among them: each is joined exactly once."""
    stack.broker.start()
    stack.start()
    generations, feedback = votes(stack, 150)
    acked = [stack.submit(one).feedback_id for one in feedback]
    stack.publish(*generations[:150])
    stack.wait_joined(acked[:1])
    stack.publish(*generations[150:], *generations[:50])
    stack.collector.kill()
    stack.start()
    stack.wait_joined(acked)
    events = stack.comparisons(set(acked))
    assert {record.comparison_id for record in stack.find(acked)} == {e.comparison_id for e in events.values()}
    assert stack.collector.stop() == 0


def test_it_takes_feedback_before_there_is_a_broker(stack: Stack) -> None:
    stack.start()
    generations, feedback = votes(stack, 5)
    acked = [stack.submit(one).feedback_id for one in feedback]
    assert {record.state for record in stack.find(acked)} == {FeedbackState.FEEDBACK_STATE_HELD}
    stack.broker.start()
    stack.publish(*generations)
    stack.comparisons(set(acked))
    assert stack.collector.stop() == 0


def test_a_poison_record_blocks_nothing(stack: Stack) -> None:
    stack.broker.start()
    stack.start()
    generations, feedback = votes(stack, 1)
    acked = stack.submit(feedback[0]).feedback_id
    producer = stack.log.producer()
    position = producer.send(topics.GENERATIONS, b"k", b"\xff no message").result(SECONDS)
    producer.close(SECONDS)
    stack.publish(*generations)
    stack.comparisons({acked})
    [record] = stack.read(topics.DEADLETTER, lambda records: len(records) >= 1)
    letter = DeadLetter.FromString(record.value)
    assert (letter.topic, letter.partition, letter.offset) == position
    assert (letter.key, letter.value, letter.consumer) == (b"k", b"\xff no message", "collector")
    assert "GenerationEvent" in letter.reason


def test_replay_publishes_all_of_it_again_with_the_same_bytes(stack: Stack, url: str, tmp_path: Path) -> None:
    stack.broker.start()
    stack.start()
    generations, feedback = votes(stack, 20)
    stack.publish(*generations)
    acked = [stack.submit(one).feedback_id for one in feedback]
    stack.wait_joined(acked)
    stack.comparisons(set(acked))
    before = {(r.key, r.value, r.headers) for r in stack.read(topics.COMPARISONS, lambda records: len(records) >= 20)}
    command = [sys.executable, "-m", "thumbwheel.cli", "collector", "replay", "--from", "beginning"]
    told = subprocess.run(
        [*command, "--home", str(tmp_path), "--database", url], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(told.stdout.split()[0]) >= 40
    again = stack.read(topics.COMPARISONS, lambda records: len(records) >= 40)
    assert {(r.key, r.value, r.headers) for r in again} == before
    assert [r.value for r in again[:20]] == [r.value for r in again[20:]], "in the same order"
    assert stack.collector.stop() == 0
