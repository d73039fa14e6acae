"""What kafka-python raises of its own where a broker knows fewer partitions than were asked about."""

from __future__ import annotations

from typing import Any

import pytest

from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.stream.kafka_client import kafka
from thumbwheel.stream.kafka_consumer import offsets_of

HERE, GONE = (kafka.TopicPartition("t", number) for number in range(2))


def _ask(partitions: list[Any], *, timeout_ms: int) -> dict[Any, int]:
    assert timeout_ms > 0
    known = {HERE: 7}
    return {partition: known[partition] for partition in partitions}


def test_a_partition_that_is_not_there_any_more_is_a_fault_that_may_pass() -> None:
    assert offsets_of(_ask, [HERE]) == {HERE: 7}
    with pytest.raises(kafka_errors.UnknownTopicOrPartitionError, match="partition=1") as raised:
        offsets_of(_ask, [HERE, GONE])
    assert raised.value.retriable
