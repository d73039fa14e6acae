"""The two logs that must keep the same promises, each with a broker of its own to mistreat."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support import stopped
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.kafka import KafkaLog
from thumbwheel.stream.log import Consumer, Log, Producer, Record, Topic, TopicPartition
from thumbwheel.stream.memory import MemoryLog

T = "thumbwheel.test.v1"
SECONDS = 15.0
QUEUE = 50
DELIVERY_TIMEOUT = 3.0


class Rig(Protocol):
    """A log, and what can befall its broker. Queues hold 50 records; records are given up after 3 s."""

    log: Log

    def away(self) -> contextlib.AbstractContextManager[None]:
        """The broker does not answer; afterwards it does again, and has what it had."""
        ...

    def restart(self) -> None:
        """It is killed and started again, with nothing of what it had."""
        ...

    def committed(self, group: str) -> dict[TopicPartition, int]:
        """What it knows of a group."""
        ...


class MemoryRig:
    def __init__(self) -> None:
        self.memory = MemoryLog(queue_size=QUEUE, delivery_timeout=DELIVERY_TIMEOUT)
        self.log: Log = self.memory

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.memory.stop()
        try:
            yield
        finally:
            self.memory.start()

    def restart(self) -> None:
        self.memory.stop()
        self.memory.lose()
        self.memory.start()

    def committed(self, group: str) -> dict[TopicPartition, int]:
        return self.memory.committed(group)


class KafkaRig:
    def __init__(self, folder: Path) -> None:
        self.broker = EmbeddedBroker(port=0, log=folder / "broker.log")
        self.broker.start()
        self.log: Log = KafkaLog(
            self.broker.bootstrap_servers,
            queue_records=QUEUE,
            delivery_timeout=DELIVERY_TIMEOUT,
            refresh_interval=0.1,
            request_timeout=1.0,
        )

    def away(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.broker.pid)

    def restart(self) -> None:
        self.broker.kill()
        self.broker.start()

    def committed(self, group: str) -> dict[TopicPartition, int]:
        from thumbwheel.stream.kafka_client import client, kafka

        admin = client(kafka.KafkaAdminClient, bootstrap_servers=self.broker.bootstrap_servers)
        try:
            offsets = admin.list_group_offsets(group)[group]
            return {TopicPartition(*tp): found.offset for tp, found in offsets.items()}
        finally:
            admin.close()


@pytest.fixture(params=["memory", "kafka"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "memory":
        memory = MemoryRig()
        yield memory
        memory.log.close()
        return
    kafka = KafkaRig(tmp_path)
    try:
        yield kafka
    finally:
        kafka.log.close()
        kafka.broker.kill()


@pytest.fixture
def topic(rig: Rig) -> str:
    rig.log.ensure_topics([Topic(T, 3)], SECONDS)
    return T


def read(consumer: Consumer, count: int) -> list[Record]:
    """Exactly `count` records: waits for them, and sees that no more come with them."""
    got: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while len(got) < count and time.monotonic() < deadline:
        got += consumer.poll(0.5)
    assert len(got) == count, f"{len(got)} records, not {count}: {[r.value for r in got]}"
    return got


def read_until(consumer: Consumer, enough: Callable[[list[Record]], bool]) -> list[Record]:
    got: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while not enough(got):
        assert time.monotonic() < deadline, [r.value for r in got]
        got += consumer.poll(0.2)
    return got


def send(producer: Producer, values: Iterable[bytes], *, key: bytes = b"k") -> None:
    for future in [producer.send(T, key, value) for value in values]:
        future.result(SECONDS)


def by_key(records: Iterable[Record]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = defaultdict(list)
    for record in records:
        found[record.key].append(record.value)
    return dict(found)
