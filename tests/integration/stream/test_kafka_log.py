"""What only a real broker shows."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from tests.support import stopped
from thumbwheel import errors
from thumbwheel.stream import open_log
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.kafka import KafkaLog
from thumbwheel.stream.kafka_client import client, kafka
from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.stream.kafka_producer import KafkaLogProducer
from thumbwheel.stream.log import Position, Topic, TopicPartition

SECONDS = 15.0
T = "thumbwheel.test.v1"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(port=0, log=tmp_path / "broker.log") as started:
        yield started


@pytest.fixture
def log(broker: EmbeddedBroker) -> Iterator[KafkaLog]:
    opened = KafkaLog(broker.bootstrap_servers, refresh_interval=0.1, delivery_timeout=10.0)
    opened.ensure_topics([Topic(T, 2)], SECONDS)
    yield opened
    opened.close()


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def read(log: KafkaLog, count: int) -> list[bytes]:
    consumer = log.consumer([T], group="reader")
    got: list[bytes] = []
    deadline = time.monotonic() + SECONDS
    while len(got) < count and time.monotonic() < deadline:
        got += [r.value for r in consumer.poll(0.5)]
    consumer.close()
    return got


def test_a_log_may_be_opened_before_its_broker_runs(tmp_path: Path) -> None:
    with EmbeddedBroker(port=0, log=tmp_path / "broker.log") as broker:
        pass  # so that the port is known, and free
    log = open_log(broker.bootstrap_servers)
    producer, consumer = log.producer(), log.consumer([T], group="g")
    waiting = producer.send(T, b"k", b"early")
    with pytest.raises(errors.Unavailable, match=broker.bootstrap_servers):
        log.ensure_topics([Topic(T)], 0.3)
    assert consumer.poll(0.1) == []
    broker.start()
    try:
        assert waiting.result(SECONDS).offset == 0  # the topic was made, though `ensure_topics` had given up
        assert [r.value for r in consumer.poll(SECONDS)] == [b"early"]
    finally:
        consumer.close()
        producer.close(SECONDS)
        log.close()
        broker.kill()


def test_several_producers_survive_a_broker_that_gives_their_ids_away_again(
    broker: EmbeddedBroker, log: KafkaLog
) -> None:
    producers = [log.producer() for _ in range(3)]
    for n in range(4):
        for producer in producers:
            producer.send(T, b"k", b"old %d" % n).result(SECONDS)
    broker.kill()
    broker.start()
    # The last producer of before is the first of now, and has the first one's id.
    futures = [
        p.send(T, b"k", b"new %d %d" % (n, i)) for n in range(6) for i, p in reversed(list(enumerate(producers)))
    ]
    positions = [future.result(SECONDS) for future in futures]
    assert len(set(positions)) == 18
    got = read(log, 18)
    for i in range(3):
        mine = [value for value in got if value.endswith(b" %d" % i)]
        assert list(dict.fromkeys(mine)) == [b"new %d %d" % (n, i) for n in range(6)]
    for producer in producers:
        producer.close(SECONDS)


def _lost(
    broker: EmbeddedBroker, log: KafkaLog, before: Callable[[KafkaLogProducer], None] = lambda producer: None
) -> tuple[KafkaLogProducer, Future[Position]]:
    """A producer of the broker's life before, and a record whose topic nobody has made anew."""
    producer = log.producer()
    producer.send("again", b"k", b"old").result(SECONDS)
    before(producer)
    broker.kill()
    stranded = producer.send("again", b"k", b"late")
    broker.start()
    return producer, stranded


def test_a_republished_topic_is_made_anew_by_nobody_but_its_writer(broker: EmbeddedBroker) -> None:
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05)
    log.ensure_topics([Topic("ours"), Topic("again", republished=True)], SECONDS)
    late, stranded = _lost(broker, log)
    late.send("ours", b"k", b"new").result(SECONDS)  # that topic is there again
    assert log.topic_ids(["again"], SECONDS) == {}
    assert not stranded.done()
    with pytest.raises(errors.DeadlineExceeded):
        late.close(0.0)
    assert isinstance(stranded.exception(SECONDS), errors.Unavailable)
    log.ensure_topics([Topic("again", republished=True)], SECONDS)
    writer = log.producer()
    assert writer.send("again", b"k", b"old").result(SECONDS).offset == 0
    writer.close(SECONDS)
    log.close()


class _NoAnswer:
    """What kafka-python has for a record whose broker forgot its producer: now and then it waits for ever."""

    def add_callback(self, *_: object) -> None: ...

    def add_errback(self, *_: object) -> None: ...


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed before", "noticed after"])
def test_a_producer_of_before_a_loss_is_not_waited_for(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch, *, noticed: bool
) -> None:
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05 if noticed else 4.0)
    log.ensure_topics([Topic("ours"), Topic("again", republished=True)], SECONDS)

    def silence(producer: KafkaLogProducer) -> None:
        monkeypatch.setattr(producer._client, "send", lambda *_, **__: _NoAnswer())

    producer, stranded = _lost(broker, log, silence)
    if noticed:
        assert log.topic_ids(["again"], SECONDS) == {}
    assert producer.send("ours", b"k", b"new").result(SECONDS).offset == 0
    assert not stranded.done()
    with pytest.raises(errors.DeadlineExceeded):
        producer.close(0.0)
    log.close()


def test_a_client_that_says_nothing_is_given_up(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one did after a partition of the network: its requests were neither answered nor timed out."""
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05, request_timeout=0.5)
    log.ensure_topics([Topic(T)], SECONDS)
    producer = log.producer()
    producer.send(T, b"k", b"first").result(SECONDS)
    before = metric("thumbwheel_stream_producers_renewed_total")
    monkeypatch.setattr(producer._client, "send", lambda *_, **__: _NoAnswer())
    waiting = [producer.send(T, b"k", b"%d" % n) for n in range(3)]
    assert [future.result(SECONDS).offset for future in waiting] == [1, 2, 3]
    assert metric("thumbwheel_stream_producers_renewed_total") == before + 1
    producer.close(SECONDS)
    log.close()


@pytest.mark.parametrize("raising", [False, True], ids=["silent", "raising"])
def test_a_client_that_hears_nothing_is_given_up(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch, *, raising: bool
) -> None:
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05, request_timeout=0.5)
    log.ensure_topics([Topic(T)], SECONDS)
    producer, consumer = log.producer(), log.consumer([T], group="g")
    before = metric("thumbwheel_stream_consumers_renewed_total")
    # That there is nothing is heard too: for longer than one may be silent, nobody is.
    assert consumer.poll(2.0) == []
    assert metric("thumbwheel_stream_consumers_renewed_total") == before

    def wait(timeout_ms: int, max_records: int) -> dict[object, list[object]]:
        threading.Event().wait(min(timeout_ms / 1000, 0.05))
        if raising:
            raise kafka_errors.NodeNotReadyError("it is never ready")
        return {}

    monkeypatch.setattr(consumer._client, "poll", wait)
    producer.send(T, b"k", b"first").result(SECONDS)
    assert [record.value for record in consumer.poll(SECONDS)] == [b"first"]
    assert metric("thumbwheel_stream_consumers_renewed_total") == before + 1
    consumer.close()
    producer.close(SECONDS)
    log.close()


def test_no_client_is_given_up_while_no_broker_answers_any(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05, request_timeout=0.5, delivery_timeout=3.0)
    log.ensure_topics([Topic(T)], SECONDS)
    producer, consumer = log.producer(), log.consumer([T], group="g")
    producer.send(T, b"k", b"first").result(SECONDS)
    consumer.poll(SECONDS)
    assert consumer.poll(2.0) == []  # brokers have answered for longer than a client may be silent
    before = metric("thumbwheel_stream_consumers_renewed_total")
    with stopped(broker.pid):
        waiting = producer.send(T, b"k", b"late")
        assert consumer.poll(2.0) == []
        assert isinstance(waiting.exception(SECONDS), errors.Unavailable)
    assert metric("thumbwheel_stream_consumers_renewed_total") == before
    assert not [record for record in caplog.records if "has said nothing" in getattr(record, "reason", "")]
    consumer.close()
    producer.close(SECONDS)
    log.close()


def test_what_comes_after_a_record_that_was_given_up_does_not_wait_for_it(broker: EmbeddedBroker) -> None:
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.05, request_timeout=0.5, delivery_timeout=2.0)
    log.ensure_topics([Topic(T, 1)], SECONDS)
    producer = log.producer()
    producer.send(T, b"k", b"before").result(SECONDS)
    with stopped(broker.pid):
        for value in (b"late", b"later"):
            assert isinstance(producer.send(T, b"k", value).exception(SECONDS), errors.Unavailable)
    producer.send(T, b"k", b"after").result(SECONDS)
    producer.close(SECONDS)
    log.close()


def test_what_a_client_does_not_take_keeps_its_place(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = log.producer()
    producer.send(T, b"k", b"0").result(SECONDS)
    send, calls = producer._client.send, itertools.count()

    def refusing(*given: object, **named: object) -> object:
        if next(calls) in (0, 3, 4):
            raise kafka_errors.KafkaTimeoutError("it does not know the partitions")
        return send(*given, **named)

    monkeypatch.setattr(producer._client, "send", refusing)
    sent = producer.send_all([(T, b"k", b"%d" % n, ()) for n in range(1, 10)]).result(SECONDS)
    assert [one.offset for one in sent if isinstance(one, Position)] == list(range(1, 10))
    assert read(log, 10) == [b"%d" % n for n in range(10)]
    producer.close(SECONDS)


def test_a_duplicate_that_is_none_is_not_taken_for_success(log: KafkaLog) -> None:
    """A producer id that a broker has given away again: the sequence number is another record's."""
    producer = log.producer()
    at = producer.send(T, b"k", b"first").result(SECONDS)
    # What a broker does that lost its log, seen from here: our next sequence number was used by somebody else.
    producer._client._transaction_manager._sequence_numbers[kafka.TopicPartition(T, at.partition)] = 0
    assert producer.send(T, b"k", b"second").result(SECONDS).offset == 1
    assert read(log, 2) == [b"first", b"second"]
    producer.close(SECONDS)


def test_records_up_to_two_mebibytes_pass_and_larger_ones_are_refused(log: KafkaLog) -> None:
    producer = log.producer()
    large = bytes(2 * 1024 * 1024 - 1024)
    assert producer.send(T, b"k", large).result(SECONDS).offset == 0
    with pytest.raises(errors.InvalidArgument, match="value: A record of"):
        producer.send(T, b"k", large + bytes(1024)).result(SECONDS)
    assert producer.send(T, b"k", b"next").result(SECONDS).offset == 1
    assert [len(value) for value in read(log, 2)] == [len(large), 4]
    producer.close(SECONDS)


def test_the_queue_is_bounded_in_bytes(broker: EmbeddedBroker) -> None:
    log = KafkaLog(broker.bootstrap_servers, queue_bytes=100_000, delivery_timeout=SECONDS)
    log.ensure_topics([Topic(T)], SECONDS)
    producer = log.producer()
    broker.kill()
    kept = producer.send(T, b"k", bytes(60_000))
    with pytest.raises(errors.ResourceExhausted, match="1 records"):
        producer.send(T, b"k", bytes(60_000)).result(0)
    assert not kept.done()
    with pytest.raises(errors.DeadlineExceeded):
        producer.close(0.1)
    with pytest.raises(errors.Unavailable, match="closed"):
        kept.result(0)
    log.close()


def test_a_record_is_read_soon_after_it_is_written(log: KafkaLog) -> None:
    producer, consumer = log.producer(), log.consumer([T], group="g")
    consumer.poll(0.2)
    took = []
    for n in range(5):
        began = time.monotonic()
        producer.send(T, b"%d" % n, b"x")
        assert len(consumer.poll(SECONDS)) == 1
        took.append(time.monotonic() - began)
    assert sorted(took)[2] < 0.5, took
    consumer.close()
    producer.close(SECONDS)


def test_metrics_count_records_and_lag(log: KafkaLog) -> None:
    names = ["sent", "acked"]
    before = {name: metric(f"thumbwheel_stream_records_{name}_total", topic=T) for name in names}
    producer = log.producer()
    for _ in range(10):
        producer.send(T, b"k", b"v")
    producer.flush(SECONDS)
    consumer = log.consumer([T], group="lagging")
    deadline = time.monotonic() + SECONDS
    while not (got := consumer.poll(0.5, max_records=4)):
        assert time.monotonic() < deadline
    assert metric("thumbwheel_stream_consumer_lag", topic=T, group="lagging") == 10 - len(got)
    after = {name: metric(f"thumbwheel_stream_records_{name}_total", topic=T) for name in names}
    assert {name: after[name] - before[name] for name in names} == {"sent": 10, "acked": 10}
    assert metric("thumbwheel_stream_up") == 1
    consumer.close()
    producer.close(SECONDS)


def test_nothing_is_left_running_though_the_broker_is_away(broker: EmbeddedBroker) -> None:
    before = set(threading.enumerate())
    log = KafkaLog(broker.bootstrap_servers, refresh_interval=0.1)
    log.ensure_topics([Topic(T)], SECONDS)
    producer, consumer = log.producer(), log.consumer([T], group="g")
    producer.send(T, b"k", b"v").result(SECONDS)
    assert len(consumer.poll(SECONDS)) == 1
    broker.kill()
    producer.send(T, b"k", b"never")
    fresh = log.producer()
    fresh.send(T, b"k", b"never")
    assert consumer.poll(0.5) == []
    for each in (producer, fresh):
        with pytest.raises(errors.DeadlineExceeded):
            each.close(0.1)
    consumer.close()
    log.close()
    deadline = time.monotonic() + SECONDS
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        next(iter(left)).join(1.0)
    assert left == set()


def test_a_topic_made_anew_with_other_partitions_is_read_whole(broker: EmbeddedBroker, log: KafkaLog) -> None:
    def make(partitions: int) -> None:
        other = KafkaLog(broker.bootstrap_servers)
        other.ensure_topics([Topic("other", partitions)], SECONDS)
        other.close()

    make(1)
    consumer, producer = log.consumer(["other"], group="g"), log.producer()
    producer.send("other", b"k", b"old").result(SECONDS)
    assert [r.value for r in consumer.poll(SECONDS)] == [b"old"]
    assert consumer.positions() == {TopicPartition("other", 0): 1}
    admin = client(kafka.KafkaAdminClient, bootstrap_servers=broker.bootstrap_servers)
    admin.delete_topics(["other"])
    admin.close()
    make(3)
    deadline = time.monotonic() + SECONDS
    while len(consumer.positions()) < 3:
        assert time.monotonic() < deadline
        consumer.poll(0.1)
    sent = {producer.send("other", b"%d" % n, b"%d" % n).result(SECONDS).partition: n for n in range(20)}
    assert set(sent) == {0, 1, 2}
    got: list[bytes] = []
    while len(got) < 20 and time.monotonic() < deadline:
        got += [r.value for r in consumer.poll(0.5)]
    assert sorted(got, key=int) == [b"%d" % n for n in range(20)]
    consumer.close()
    producer.close(SECONDS)


def test_a_connection_is_made_within_the_time_of_a_request(broker: EmbeddedBroker) -> None:
    """Also the one after many that failed."""
    made = client(kafka.KafkaAdminClient, bootstrap_servers=broker.bootstrap_servers, request_timeout_ms=2_000)
    manager = made._manager
    assert manager.socket_connection_setup_timeout_ms("node") == 2_000
    for _ in range(6):
        manager.update_backoff("node")
        assert manager.socket_connection_setup_timeout_ms("node") <= 1.2 * 2_000  # some of it is chance
    made.close()


def test_nobody_makes_a_topic_by_asking_for_it(broker: EmbeddedBroker) -> None:
    """Or what is on its way to a topic that was lost would be the first record of a new one."""
    servers = broker.bootstrap_servers
    reader = client(kafka.KafkaConsumer, bootstrap_servers=servers)
    writer = client(kafka.KafkaProducer, bootstrap_servers=servers, max_block_ms=500)
    with pytest.raises(kafka_errors.KafkaTimeoutError):
        writer.send("lost.v1", b"on its way")
    assert reader.partitions_for_topic("lost.v1") in (None, set())
    admin = client(kafka.KafkaAdminClient, bootstrap_servers=servers)
    assert admin.list_topics() == []
    admin.close()
    writer.close(timeout=1)
    reader.close()
