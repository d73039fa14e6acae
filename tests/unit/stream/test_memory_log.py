"""The hooks of the log in memory; its promises are in the conformance suite."""

from __future__ import annotations

import threading

import pytest

from thumbwheel import errors
from thumbwheel.stream.log import Topic, TopicPartition
from thumbwheel.stream.memory import MemoryLog

TP = TopicPartition("t", 0)


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog(queue_size=3, delivery_timeout=0.2)
    made.ensure_topics([Topic("t")], 1.0)
    return made


def fill(log: MemoryLog, *values: bytes) -> None:
    for value in values:
        log.producer().send("t", b"k", value).result(0)


def test_truncation_drops_the_oldest_and_keeps_offsets(log: MemoryLog) -> None:
    fill(log, b"0", b"1", b"2")
    behind, ahead = log.consumer(["t"], group="a"), log.consumer(["t"], group="b", start={TP: 2})
    log.truncate({TP: 2})
    assert [(r.offset, r.value) for r in behind.poll(0)] == [(2, b"2")]
    assert [(r.offset, r.value) for r in ahead.poll(0)] == [(2, b"2")]
    fill(log, b"3")
    assert [r.offset for r in log.records("t")] == [2, 3]


def test_losing_gives_new_ids_and_begins_at_zero(log: MemoryLog) -> None:
    fill(log, b"0", b"1")
    consumer = log.consumer(["t"], group="g")
    consumer.poll(0)
    consumer.commit({TP: 2})
    ids = log.topic_ids(["t"], 1.0)
    log.lose()
    assert log.topic_ids(["t"], 1.0) != ids
    assert log.committed("g") == {}
    fill(log, b"a", b"b", b"c")
    assert [(r.offset, r.value) for r in consumer.poll(0)] == [(0, b"a"), (1, b"b"), (2, b"c")]


def test_positions_and_ids_belong_together(log: MemoryLog) -> None:
    fill(log, b"0")
    consumer = log.consumer(["t"], group="g")
    consumer.poll(0)
    positions, ids = consumer.positions(), log.topic_ids(["t"], 1.0)
    log.lose()
    assert positions == {TP: 1}
    assert consumer.topic_ids() == ids
    assert consumer.positions() == {TP: 0}
    assert consumer.topic_ids() == log.topic_ids(["t"], 1.0)


def test_what_waits_for_a_stopped_broker_is_written_in_order_or_fails_at_its_deadline(log: MemoryLog) -> None:
    producer = log.producer()
    log.stop()
    kept = [producer.send("t", b"k", b"%d" % n) for n in range(3)]
    with pytest.raises(errors.ResourceExhausted):
        producer.send("t", b"k", b"3").result(0)
    log.start()
    assert [f.result(0).offset for f in kept] == [0, 1, 2]
    log.stop()
    with pytest.raises(errors.Unavailable):
        producer.send("t", b"k", b"late").result(5)
    log.close()
    assert [r.value for r in log.records("t")] == [b"0", b"1", b"2"]


def test_a_waiting_poll_sees_what_another_thread_writes(log: MemoryLog) -> None:
    consumer = log.consumer(["t"], group="g")
    writer = threading.Timer(0.05, fill, (log, b"later"))
    writer.start()
    assert [r.value for r in consumer.poll(10)] == [b"later"]
    writer.join()


def test_closing_wakes_a_waiting_poll(log: MemoryLog) -> None:
    consumer = log.consumer(["t"], group="g")
    closer = threading.Timer(0.05, consumer.close)
    closer.start()
    with pytest.raises(errors.FailedPrecondition):
        consumer.poll(10)
    closer.join()


def test_a_busy_partition_does_not_starve_the_others() -> None:
    log = MemoryLog()
    log.ensure_topics([Topic("t", 4)], 1.0)
    producer = log.producer()
    for n in range(400):
        producer.send("t", b"%d" % n, b"x")
    consumer = log.consumer(["t"], group="g")
    assert {r.partition for _ in range(4) for r in consumer.poll(0, max_records=10)} == {0, 1, 2, 3}


def test_a_sent_record_cannot_be_called_back(log: MemoryLog) -> None:
    log.stop()
    future = log.producer().send("t", b"k", b"v")
    assert not future.cancel()
    log.start()
    assert future.result(0).offset == 0
