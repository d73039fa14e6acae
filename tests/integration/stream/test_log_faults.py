"""What `thumbwheel.stream.log` promises where the broker does not answer or has lost all, by both logs alike."""

from __future__ import annotations

import time

import pytest

from tests.integration.stream.conftest import DELIVERY_TIMEOUT, QUEUE, SECONDS, Rig, T, read, read_until, send
from thumbwheel import errors
from thumbwheel.stream.log import LossDetector, Position, Topic, TopicPartition


def test_a_commit_does_not_fail_while_the_broker_is_away(rig: Rig, topic: str) -> None:
    consumer = rig.log.consumer([topic], group="g")
    assert consumer.poll(0.1) == []
    with rig.away():
        began = time.monotonic()
        consumer.commit({TopicPartition(topic, 0): 0})
        assert time.monotonic() - began < 0.1
    consumer.close()


def test_a_full_queue_refuses_at_once_and_keeps_what_it_has(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    send(producer, [b"before"])
    with rig.away():
        began = time.monotonic()
        futures = [producer.send(topic, b"k", b"%d" % n) for n in range(QUEUE + 1)]
        assert time.monotonic() - began < 1.0
        with pytest.raises(errors.ResourceExhausted) as full:
            futures[-1].result(0)
        assert full.value.retry_after > 0
        assert not any(f.done() for f in futures[:-1])
    offsets = [f.result(SECONDS).offset for f in futures[:-1]]
    assert offsets == list(range(1, QUEUE + 1))
    producer.close(SECONDS)


def test_many_at_once_are_as_one_after_the_other(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    assert producer.send_all([]).result(SECONDS) == []
    values = [b"%d" % n for n in range(20)]
    outcomes = producer.send_all([(topic, b"k", value, (("n", value),)) for value in values]).result(SECONDS)
    assert [outcome.offset for outcome in outcomes if isinstance(outcome, Position)] == list(range(20))
    with rig.away():
        one_too_many = producer.send_all([(topic, b"k", b"late", ())] * (QUEUE + 1)).result(SECONDS)
        assert [type(outcome) for outcome in one_too_many] == [errors.Unavailable] * QUEUE + [errors.ResourceExhausted]
    consumer = rig.log.consumer([topic], group="g")
    got = read_until(consumer, lambda got: len(got) >= 20)[:20]
    assert [(record.value, record.headers) for record in got] == [(value, (("n", value),)) for value in values]
    consumer.close()
    producer.close(SECONDS)


def test_a_record_is_given_up_at_its_deadline(rig: Rig, topic: str) -> None:
    producer = rig.log.producer()
    send(producer, [b"before"])
    with rig.away():
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match=topic):
            producer.send(topic, b"k", b"v").result(SECONDS)
        assert DELIVERY_TIMEOUT <= time.monotonic() - began < DELIVERY_TIMEOUT + 5.0
    send(producer, [b"after"])
    producer.close(SECONDS)


def test_calls_that_need_the_broker_have_deadlines(rig: Rig, topic: str) -> None:
    consumer = rig.log.consumer([topic], group="g")
    consumer.poll(0.1)
    with rig.away():
        for call in (
            lambda: rig.log.ensure_topics([Topic("x")], 0.3),
            lambda: rig.log.topic_ids([topic], 0.3),
            consumer.end_offsets,
        ):
            with pytest.raises(errors.Unavailable):
                call()
        assert consumer.poll(0.2) == []
    consumer.close()


def test_a_broker_that_comes_back_with_its_log_is_no_loss(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1)], SECONDS)
    producer, consumer, detector = rig.log.producer(), rig.log.consumer([T], group="g"), LossDetector()
    assert not detector.seen(rig.log.topic_ids([T], SECONDS))
    assert not detector.acked(producer.send(T, b"k", b"0").result(SECONDS))
    read(consumer, 1)
    with rig.away():
        waiting = producer.send(T, b"k", b"1")
        assert consumer.poll(0.5) == []
    assert not detector.acked(waiting.result(SECONDS))
    assert not detector.seen(rig.log.topic_ids([T], SECONDS))
    assert not detector.acked(producer.send(T, b"k", b"2").result(SECONDS))
    values = [r.value for r in read_until(consumer, lambda got: any(r.value == b"2" for r in got))]
    assert list(dict.fromkeys(values)) == [b"1", b"2"]
    consumer.close()
    producer.close(SECONDS)


def test_a_lost_log_is_noticed_by_both_ends_and_both_go_on(rig: Rig) -> None:
    rig.log.ensure_topics([Topic(T, 1)], SECONDS)
    producer, consumer = rig.log.producer(), rig.log.consumer([T], group="g")
    by_id, by_offset = LossDetector(), LossDetector()
    by_id.seen(rig.log.topic_ids([T], SECONDS))
    for n in range(5):
        assert not by_offset.acked(producer.send(T, b"k", b"%d" % n).result(SECONDS))
    read(consumer, 5)
    ids = consumer.topic_ids()

    rig.restart()
    deadline = time.monotonic() + SECONDS
    while not by_id.seen(rig.log.topic_ids([T], SECONDS)):  # for a moment the topic is not there
        assert time.monotonic() < deadline
    # Everything again, and more than there was: the end is past the consumer's old position.
    again = [producer.send(T, b"k", b"%d" % n).result(SECONDS) for n in range(9)]
    assert by_offset.acked(again[0])
    assert not any(by_offset.acked(position) for position in again[1:])
    got = read_until(consumer, lambda got: {r.value for r in got} == {b"%d" % n for n in range(9)})
    assert consumer.topic_ids() != ids
    firsts = list(dict.fromkeys(r.value for r in got if r.offset < 5))
    assert firsts == [b"0", b"1", b"2", b"3", b"4"]

    # Not once only.
    rig.restart()
    send(producer, [b"third life"])
    assert read_until(consumer, bool)[-1].value == b"third life"
    consumer.close()
    producer.close(SECONDS)
