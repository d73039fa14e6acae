"""What `thumbwheel.stream.log` promises, kept by the log in memory and by Kafka alike."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.stream.conftest import QUEUE, SECONDS, Rig, T, by_key, read, send
from thumbwheel import errors
from thumbwheel.stream import deadletter
from thumbwheel.stream.aio import acked, records
from thumbwheel.stream.log import Topic, TopicPartition
from thumbwheel.stream.topics import DEADLETTER
from thumbwheel.v1.events_pb2 import ComparisonEvent, DeadLetter


def test_a_record_comes_back_as_it_was_sent(rig: Rig, topic: str) -> None:
    producer, before = rig.log.producer(), time.time()
    headers = (("schema", b"x.Y"), ("twice", b"1"), ("twice", b"\xff\x00"), ("empty", b""))
    position = producer.send(topic, b"\x00key", b"\xffvalue", headers).result(SECONDS)
    consumer = rig.log.consumer([topic], group="g")
    (record,) = read(consumer, 1)
    assert (record.topic, record.partition, record.offset) == position
    assert (record.key, record.value, record.headers) == (b"\x00key", b"\xffvalue", headers)
    assert before - 1 <= record.timestamp <= time.time() + 1
    consumer.close()
    producer.close(SECONDS)


def test_records_of_a_key_stay_in_order_and_share_a_partition(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    sent = [(b"key-%d" % (n % 7), b"%d" % n) for n in range(45)]
    positions = [f.result(SECONDS) for f in [producer.send(topic, *each) for each in sent]]
    consumer = rig.log.consumer([topic], group="g")
    got = read(consumer, 45)
    assert by_key(got) == {b"key-%d" % k: [b"%d" % n for n in range(k, 45, 7)] for k in range(7)}
    assert len({p.partition for p in positions}) > 1
    for key in range(7):
        mine = positions[key::7]
        assert len({p.partition for p in mine}) == 1
        assert [p.offset for p in mine] == sorted({p.offset for p in mine})
    consumer.close()
    producer.close(SECONDS)


def test_reading_begins_at_the_start_and_at_the_oldest_where_none_is_given(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1), Topic("other", 1)], SECONDS)
    producer = rig.log.producer()
    send(producer, [b"0", b"1", b"2", b"3"])
    producer.send("other", b"k", b"oldest").result(SECONDS)
    consumer = rig.log.consumer([T, "other"], group="g", start={TopicPartition(T, 0): 2})
    assert {r.value for r in read(consumer, 3)} == {b"2", b"3", b"oldest"}
    assert consumer.positions() == {TopicPartition(T, 0): 4, TopicPartition("other", 0): 1}
    consumer.close()
    producer.close(SECONDS)


def test_positions_count_only_with_the_topic_they_belong_to(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1)], SECONDS)
    producer, start = rig.log.producer(), {TopicPartition(T, 0): 2}
    send(producer, [b"0", b"1", b"2"])
    ids = rig.log.topic_ids([T, "missing"], SECONDS)
    assert list(ids) == [T]
    same = rig.log.consumer([T], group="g", start=start, topic_ids=ids)
    assert [r.value for r in read(same, 1)] == [b"2"]
    other = rig.log.consumer([T], group="g", start=start, topic_ids={T: str(uuid.uuid4())})
    assert [r.value for r in read(other, 3)] == [b"0", b"1", b"2"]
    assert same.topic_ids() == other.topic_ids() == ids
    same.close()
    other.close()
    producer.close(SECONDS)


def test_seek_moves_only_what_it_names(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    positions = {p.partition: p for p in [producer.send(topic, b"%d" % n, b"x").result(SECONDS) for n in range(20)]}
    assert set(positions) == {0, 1, 2}
    consumer = rig.log.consumer([topic], group="g")
    read(consumer, 20)
    ends = {TopicPartition(topic, p.partition): p.offset + 1 for p in positions.values()}
    assert consumer.positions() == ends
    first = TopicPartition(topic, 0)
    consumer.seek({first: 1})
    assert consumer.positions() == {**ends, first: 1}
    assert {r.partition for r in read(consumer, ends[first] - 1)} == {0}
    assert consumer.positions() == ends
    consumer.close()
    producer.close(SECONDS)


def test_a_position_past_the_end_goes_back_to_the_oldest(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1)], SECONDS)
    producer = rig.log.producer()
    send(producer, [b"0", b"1"])
    consumer = rig.log.consumer([T], group="g", start={TopicPartition(T, 0): 1000})
    assert [r.value for r in read(consumer, 2)] == [b"0", b"1"]
    consumer.close()
    producer.close(SECONDS)


def test_end_offsets_are_one_past_the_last(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    consumer = rig.log.consumer([topic], group="g")
    partitions = [TopicPartition(topic, n) for n in range(3)]
    assert consumer.end_offsets() == dict.fromkeys(partitions, 0)
    for count in (1, 40):  # a batch of one, and batches of several
        last = [f.result(SECONDS) for f in [producer.send(topic, b"a", b"x") for _ in range(count)]][-1]
    at = TopicPartition(topic, last.partition)
    assert last.offset == 40
    assert consumer.end_offsets() == {**dict.fromkeys(partitions, 0), at: 41}
    read(consumer, 41)
    assert consumer.positions() == consumer.end_offsets()
    consumer.close()
    producer.close(SECONDS)


def test_flush_waits_for_every_acknowledgement(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    futures = [producer.send(topic, b"%d" % n, b"x") for n in range(QUEUE)]
    producer.flush(SECONDS)
    assert all(f.done() for f in futures)
    assert len({f.result(0) for f in futures}) == QUEUE
    producer.close(SECONDS)


def test_flush_has_a_deadline(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    send(producer, [b"before"])
    with rig.away():
        future = producer.send(topic, b"k", b"waits")
        with pytest.raises(errors.DeadlineExceeded, match="1 records"):
            producer.flush(0.2)
    future.result(SECONDS)
    producer.close(SECONDS)


def test_a_commit_never_moves_reading(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1)], SECONDS)
    producer, tp = rig.log.producer(), TopicPartition(T, 0)
    send(producer, [b"0", b"1", b"2"])
    consumer = rig.log.consumer([T], group="g")
    read(consumer, 3)
    consumer.commit({tp: 1})
    consumer.commit({tp: 2})
    deadline = time.monotonic() + SECONDS
    while rig.committed("g") != {tp: 2}:
        assert time.monotonic() < deadline
    assert consumer.positions() == {tp: 3}
    send(producer, [b"3"])
    assert [r.value for r in read(consumer, 1)] == [b"3"]
    again = rig.log.consumer([T], group="g")
    assert [r.value for r in read(again, 4)] == [b"0", b"1", b"2", b"3"]
    again.close()
    consumer.close()
    producer.close(SECONDS)


def test_topics_are_made_once(rig: Rig) -> None:
    rig.log.ensure_topics([Topic("one", 2), Topic("two", 1, compacted=True)], SECONDS)
    ids = rig.log.topic_ids(["one", "two"], SECONDS)
    assert len(set(ids.values())) == 2
    rig.log.ensure_topics([Topic("one", 5), Topic("three", 1)], SECONDS)
    after = rig.log.topic_ids(["one", "two", "three"], SECONDS)
    assert {name: after[name] for name in ids} == ids
    consumer = rig.log.consumer(["one"], group="g")
    assert set(consumer.positions()) == {TopicPartition("one", 0), TopicPartition("one", 1)}
    consumer.close()


def test_an_empty_poll_ends_in_time(rig: Rig, topic: str) -> None:
    consumer = rig.log.consumer([topic], group="g")
    consumer.poll(0.1)
    began = time.monotonic()
    assert consumer.poll(0.3) == []
    assert 0.25 < time.monotonic() - began < 3.0
    consumer.close()


def test_a_poll_returns_at_most_what_it_is_asked_for_and_passes_over_nothing(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    for n in range(30):
        producer.send(topic, b"%d" % (n % 5), b"%d" % n)
    producer.flush(SECONDS)
    consumer = rig.log.consumer([topic], group="g")
    got: list[bytes] = []
    deadline = time.monotonic() + SECONDS
    while len(got) < 30 and time.monotonic() < deadline:
        batch = consumer.poll(0.5, max_records=4)
        assert len(batch) <= 4
        got += [r.value for r in batch]
    assert sorted(got, key=int) == [b"%d" % n for n in range(30)]
    consumer.close()
    producer.close(SECONDS)


def test_a_consumer_may_come_before_its_topic(rig: Rig) -> None:
    consumer = rig.log.consumer(["later"], group="g")
    assert consumer.poll(0.1) == []
    rig.log.ensure_topics([Topic("later", 1)], SECONDS)
    producer = rig.log.producer()
    producer.send("later", b"k", b"v").result(SECONDS)
    assert [r.value for r in read(consumer, 1)] == [b"v"]
    consumer.close()
    producer.close(SECONDS)


def test_a_record_for_a_missing_topic_fails(rig: Rig) -> None:
    producer = rig.log.producer()
    with pytest.raises(errors.Unavailable, match="nowhere"):
        producer.send("nowhere", b"k", b"v").result(SECONDS)
    producer.close(SECONDS)


def test_what_is_closed_says_so(rig: Rig, topic: str) -> None:
    producer, consumer = rig.log.producer(), rig.log.consumer([topic], group="g")
    future = producer.send(topic, b"k", b"v")
    producer.close(SECONDS)
    assert future.result(0).offset == 0
    with pytest.raises(errors.FailedPrecondition):
        producer.send(topic, b"k", b"v")
    consumer.close()
    with pytest.raises(errors.FailedPrecondition):
        consumer.poll(0.1)


# The Kafka client's threads draw random numbers meanwhile, which looks to hypothesis as if the strategy did.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sent=st.lists(
        st.tuples(st.binary(max_size=3), st.binary(max_size=40), st.lists(st.tuples(st.text(max_size=5), st.binary()))),
        max_size=40,
    )
)
def test_records_in_are_records_out(rig: Rig, sent: list[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> None:
    name = f"thumbwheel.{uuid.uuid4()}.v1"
    rig.log.ensure_topics([Topic(name, 4)], SECONDS)
    producer, consumer = rig.log.producer(), rig.log.consumer([name], group="g")
    for key, value, headers in sent:
        producer.send(name, key, value, tuple(headers))
    producer.flush(SECONDS)
    got = read(consumer, len(sent))
    expected: dict[bytes, list[tuple[bytes, tuple[tuple[str, bytes], ...]]]] = defaultdict(list)
    for key, value, headers in sent:
        expected[key].append((value, tuple(headers)))
    found: dict[bytes, list[tuple[bytes, tuple[tuple[str, bytes], ...]]]] = defaultdict(list)
    for record in got:
        found[record.key].append((record.value, record.headers))
    assert found == expected
    consumer.close()
    producer.close(SECONDS)


async def test_reading_from_asyncio_passes_over_nothing_when_cancelled(rig: Rig, topic: str) -> None:
    producer, consumer = rig.log.producer(), rig.log.consumer([topic], group="g")
    seen: list[bytes] = []

    async def follow() -> None:
        async for batch in records(consumer, max_records=3, poll_timeout=0.2):
            seen.extend(r.value for r in batch)

    for n in range(20):
        await acked(producer.send(topic, b"%d" % (n % 4), b"%d" % n), SECONDS)
        task = asyncio.create_task(follow())
        await asyncio.sleep(0.005 * (n % 5))  # not a wait for anything: cancelled wherever it happens to be
        task.cancel()
        await asyncio.wait([task])
    await acked(producer.send(topic, b"last", b"20"), SECONDS)
    async with asyncio.timeout(SECONDS):
        async for batch in records(consumer):
            seen.extend(r.value for r in batch)
            if b"20" in seen:
                break
    assert sorted(seen, key=int) == [b"%d" % n for n in range(21)]
    consumer.close()
    producer.close(SECONDS)


async def test_an_undecodable_record_is_buried_and_the_next_ones_flow(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1), Topic(DEADLETTER, 1)], SECONDS)
    producer, consumer = rig.log.producer(), rig.log.consumer([T], group="g")
    good = [ComparisonEvent(event_id=str(n)) for n in range(3)]
    poison = b"\xff\xff not a message"
    for value in (good[0].SerializeToString(), poison, good[1].SerializeToString(), b"", good[2].SerializeToString()):
        producer.send(T, b"prompt", value, (("traceparent", b"00-1"),))
    decoded: list[ComparisonEvent] = []
    async with asyncio.timeout(SECONDS):
        async for batch in records(consumer):
            for record in batch:
                try:
                    decoded.append(deadletter.decode(ComparisonEvent, record))
                except errors.InvalidArgument as error:
                    await deadletter.bury(producer, record, reason=str(error), consumer="trainer")
            if len(decoded) == 3:
                break
    assert decoded == good
    graves = rig.log.consumer([DEADLETTER], group="operators")
    letters = [deadletter.decode(DeadLetter, r) for r in read(graves, 2)]
    assert [(x.topic, x.partition, x.offset, x.key, x.value) for x in letters] == [
        (T, 0, 1, b"prompt", poison),
        (T, 0, 3, b"prompt", b""),
    ]
    assert "thumbwheel.v1.ComparisonEvent" in letters[0].reason
    assert {x.consumer for x in letters} == {"trainer"}
    assert [(h.key, h.value) for h in letters[0].headers] == [("traceparent", b"00-1")]
    graves.close()
    consumer.close()
    producer.close(SECONDS)
