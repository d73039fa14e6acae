from __future__ import annotations

import asyncio
import hashlib

import pytest

from thumbwheel import errors
from thumbwheel.stream import deadletter
from thumbwheel.stream.log import Record, Topic
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.stream.topics import COMPARISONS, DEADLETTER, topics
from thumbwheel.v1.events_pb2 import ComparisonEvent, DeadLetter, VersionEvent

EVENT = ComparisonEvent(event_id="e", prompt_id="p")


def record(value: bytes, *headers: tuple[str, bytes]) -> Record:
    return Record(COMPARISONS, 2, 41, b"p", value, headers, 1.5)


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog(delivery_timeout=0.2)
    made.ensure_topics(topics(partitions=3, replication=1), 1.0)
    return made


def test_a_message_is_decoded_with_and_without_its_schema() -> None:
    value = EVENT.SerializeToString()
    assert deadletter.decode(ComparisonEvent, record(value)) == EVENT
    named = record(value, ("schema", b"thumbwheel.v1.ComparisonEvent"))
    assert deadletter.decode(ComparisonEvent, named) == EVENT


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (record(b"\xff\xff\xff"), "value"),
        (record(EVENT.SerializeToString()[:-1]), "value"),
        (record(b""), "value"),
        (record(EVENT.SerializeToString(), ("schema", b"thumbwheel.v1.VersionEvent")), "headers.schema"),
        (record(EVENT.SerializeToString(), ("schema", b"\xff")), "headers.schema"),
    ],
)
def test_what_is_not_the_message_is_named_with_its_place(bad: Record, field: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"thumbwheel\.comparisons\.v1\[2\] offset 41") as error:
        deadletter.decode(ComparisonEvent, bad)
    assert error.value.field == field


def test_a_dead_letter_carries_the_record_as_it_was(log: MemoryLog) -> None:
    bad = record(b"\xff\x00", ("traceparent", b"00-ab"), ("x", b"\xfe"))
    deadletter.publish(log.producer(), bad, reason="not a message", consumer="trainer").result(0)
    (stored,) = log.records(DEADLETTER)
    letter = deadletter.decode(DeadLetter, stored)
    assert (letter.topic, letter.partition, letter.offset) == (COMPARISONS, 2, 41)
    assert (letter.key, letter.value) == (b"p", b"\xff\x00")
    assert [(h.key, h.value) for h in letter.headers] == [("traceparent", b"00-ab"), ("x", b"\xfe")]
    assert (letter.reason, letter.consumer) == ("not a message", "trainer")
    assert letter.at.seconds > 0
    assert stored.key == COMPARISONS.encode()
    assert dict(stored.headers)["event_id"].decode() == letter.event_id
    with pytest.raises(errors.InvalidArgument, match=r"not a thumbwheel\.v1\.VersionEvent"):
        deadletter.decode(VersionEvent, stored)


def test_a_value_too_long_for_a_record_is_cut_and_the_reason_says_so(log: MemoryLog) -> None:
    value = bytes(range(256)) * 8000
    deadletter.publish(log.producer(), record(value), reason="too odd", consumer="c").result(0)
    letter = DeadLetter.FromString(log.records(DEADLETTER)[0].value)
    assert letter.value == value[: deadletter.MAX_VALUE_BYTES]
    assert str(len(value)) in letter.reason
    assert hashlib.sha256(value).hexdigest() in letter.reason


async def test_burying_goes_on_until_the_broker_has_it(log: MemoryLog) -> None:
    producer = log.producer()
    log.stop()
    burying = asyncio.create_task(deadletter.bury(producer, record(b"x"), reason="r", consumer="c", timeout=10))
    first = producer.send(DEADLETTER, b"k", b"to see a deadline pass")
    with pytest.raises(errors.Unavailable):
        await asyncio.wrap_future(first)
    assert not burying.done()
    log.start()
    await asyncio.wait_for(burying, 10)
    assert DeadLetter.FromString(log.records(DEADLETTER)[-1].value).value == b"x"


async def test_burying_gives_up_at_its_deadline(log: MemoryLog) -> None:
    log.stop()
    with pytest.raises(errors.Unavailable):
        await deadletter.bury(log.producer(), record(b"x"), reason="r", consumer="c", timeout=0.4)
    log.close()
    assert log.records(DEADLETTER) == []


async def test_a_missing_topic_is_not_waited_for_for_ever() -> None:
    log = MemoryLog()
    log.ensure_topics([Topic(COMPARISONS)], 1.0)
    with pytest.raises(errors.Unavailable, match=DEADLETTER):
        await deadletter.bury(log.producer(), record(b"x"), reason="r", consumer="c", timeout=0.1)
