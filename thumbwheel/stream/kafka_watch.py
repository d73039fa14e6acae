"""What the brokers hold, asked for in the background: one thread a process keeps an eye on the topics.

    watch ── every second ──▶ which topics exist, under which ids, with how many partitions
          ├─ creates those that were asked for and are missing (a memory-only broker forgets them)
          └─ commits positions, for lag monitoring

Producers and consumers look at its last answer and never wait for it; a topic whose id has changed was lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge

from thumbwheel import errors
from thumbwheel.stream.kafka_client import MAX_MESSAGE_BYTES, client, kafka
from thumbwheel.stream.kafka_client import errors as kafka_errors
from thumbwheel.stream.log import Topic, TopicPartition

logger = logging.getLogger(__name__)

UP = Gauge("thumbwheel_stream_up", "1 where the brokers answered when last asked.")
COMMITS_FAILED = Counter("thumbwheel_stream_commits_failed_total", "Commits for lag monitoring that failed.", ["group"])

_HURRY_SECONDS = 0.2


class TopicState(NamedTuple):
    """A topic that exists."""

    id: str
    partitions: int


class Watch:
    """Asks the brokers every `interval` seconds; `configs` are those of kafka-python. Thread-safe."""

    def __init__(self, configs: Mapping[str, Any], *, interval: float) -> None:
        self._configs = dict(configs)
        self._interval = interval
        self._changed = threading.Condition()
        self._followed: set[str] = set()
        self._wanted: dict[str, Topic] = {}
        self._refused: dict[str, errors.ThumbwheelError] = {}
        self._commits: dict[str, dict[TopicPartition, int]] = {}
        self._topics: Mapping[str, TopicState] = MappingProxyType({})
        self._begun = self._answered = 0
        self._waiting = 0
        self._poked = False
        self._last_error = "not asked yet"
        self._up: bool | None = None
        self._up_since = self._up_last = 0.0
        self._closed = False
        self._admin: Any = None
        self._thread = threading.Thread(target=self._run, name="stream-watch", daemon=True)
        self._thread.start()

    def topics(self) -> Mapping[str, TopicState]:
        """The topics of the last answer; the same object as long as nothing has changed."""
        return self._topics

    def answering_seconds(self, since: float) -> float:
        """Seconds after `since`, by the monotonic clock, in which each question was answered, to the last answer.

        0 where the last question had none.
        """
        return max(0.0, self._up_last - max(self._up_since, since)) if self._up else 0.0

    def follow(self, names: Iterable[str]) -> None:
        """Topics to ask for from now on."""
        with self._changed:
            if not self._followed.issuperset(names):
                self._followed.update(names)
                self._poke()

    def await_change(self, seen: Mapping[str, TopicState], timeout: float) -> None:
        """Waits until `topics` differs from `seen`, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._topics is not seen or self._closed, timeout)

    def ensure(self, topics: Iterable[Topic], timeout: float) -> None:
        """See `Log.ensure_topics`. Raises `errors.FailedPrecondition` where a broker refuses."""
        wanted = {topic.name: topic for topic in topics}
        with self._changed:
            self._wanted.update(wanted)
            for name in wanted:
                self._refused.pop(name, None)
        try:
            self.fresh(wanted, timeout, until=lambda: all(n in self._topics or n in self._refused for n in wanted))
        finally:
            with self._changed:
                for name in (name for name, topic in wanted.items() if topic.republished):
                    self._wanted.pop(name, None)
        for name, topic in wanted.items():
            if name in self._refused:
                raise self._refused[name]
            there = self._topics.get(name)
            if there is not None and there.partitions != topic.partitions:
                logger.warning("%s has %d partitions, not %d; it stays so", name, there.partitions, topic.partitions)

    def fresh(
        self, names: Iterable[str], timeout: float, *, until: Callable[[], bool] = lambda: True
    ) -> dict[str, TopicState]:
        """Asks now, and returns those of the topics that exist. Raises `errors.Unavailable`."""
        names = list(names)
        with self._changed:
            self._followed.update(names)
            ticket = self._begun + 1
            self._waiting += 1
            self._poke()
            try:
                done = self._changed.wait_for(lambda: self._closed or (self._answered >= ticket and until()), timeout)
            finally:
                self._waiting -= 1
            if not done or self._closed:
                raise errors.Unavailable(
                    f"The brokers at {self._configs['bootstrap_servers']} did not answer within {timeout:g} s: "
                    f"{self._last_error}.",
                    remedy="Check --bootstrap-servers, and that a broker runs there.",
                )
            return {name: self._topics[name] for name in names if name in self._topics}

    def commit(self, group: str, positions: Mapping[TopicPartition, int]) -> None:
        """Commits these positions with the next question."""
        with self._changed:
            self._commits.setdefault(group, {}).update(positions)

    def close(self, timeout: float) -> None:
        """Commits what waits, and stops."""
        with self._changed:
            self._closed = True
            self._poke()
        self._thread.join(timeout)

    def _poke(self) -> None:
        self._poked = True
        self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                self._begun += 1
                number, self._poked = self._begun, False
                followed = sorted(self._followed | self._wanted.keys())
            try:
                self._ask(number, followed)
                self._send_commits()
            except (kafka_errors.KafkaError, OSError) as error:
                self._fail(error)
            except Exception as error:  # nobody else would notice that this thread has ended
                logger.exception("asking the brokers failed in a way that is not known")
                self._fail(error)
            with self._changed:
                hurry = self._waiting or not self._followed.issubset(self._topics)
                self._changed.wait_for(lambda: self._poked, _HURRY_SECONDS if hurry else self._interval)
        try:
            if self._admin is not None:
                self._send_commits()
        except (kafka_errors.KafkaError, OSError) as error:
            self._fail(error)
        self._drop()

    def _ask(self, number: int, followed: list[str]) -> None:
        if self._admin is None:
            self._admin = client(kafka.KafkaAdminClient, **self._configs)
        there = self._describe(followed)
        missing = [topic for name, topic in self._wanted.items() if name not in there and name not in self._refused]
        if missing:
            self._create(missing)
            there = self._describe(followed)
        with self._changed:
            if there != self._topics:
                self._topics = MappingProxyType(there)
            self._up_last = time.monotonic()
            if not self._up:
                self._up_since = self._up_last
                logger.info("the brokers answer", extra={"servers": self._configs["bootstrap_servers"]})
            self._up, self._answered = True, number
            self._changed.notify_all()
        UP.set(1)

    def _describe(self, names: list[str]) -> dict[str, TopicState]:
        """Those topics whose partitions all have a leader."""
        return {
            topic["name"]: TopicState(str(topic["topic_id"] or ""), len(topic["partitions"]))
            for topic in self._admin.describe_topics(names)
            if topic["error_code"] == 0
            and topic["partitions"]
            and all(p["leader_id"] >= 0 for p in topic["partitions"])
        }

    def _create(self, missing: list[Topic]) -> None:
        asked = {topic.name: _creation(topic) for topic in missing}
        for result in self._admin.create_topics(asked, raise_errors=False)["topics"]:
            name, error = result["name"], kafka_errors.for_code(result["error_code"])
            if error is kafka_errors.NoError:
                logger.info("topic created", extra={"topic": name})
            elif error is not kafka_errors.TopicAlreadyExistsError and not error.retriable:
                self._refused[name] = errors.FailedPrecondition(
                    f"The broker refuses to create the topic {name}: {error.__name__} {result['error_message'] or ''}.",
                    remedy="Check --topic-partitions and --topic-replication, or create it by hand.",
                )

    def _send_commits(self) -> None:
        with self._changed:
            commits, self._commits = self._commits, {}
        for group, positions in commits.items():
            offsets = {
                kafka.TopicPartition(*tp): kafka.structs.OffsetAndMetadata(offset, "", -1)
                for tp, offset in positions.items()
            }
            # Not tried again: the next commit says more than this one.
            try:
                results = self._admin.alter_group_offsets(group, offsets)
            except kafka_errors.KafkaError:
                COMMITS_FAILED.labels(group).inc()
                raise
            for tp, error in results.items():
                if error is not kafka_errors.NoError:
                    COMMITS_FAILED.labels(group).inc()
                    logger.warning("commit failed", extra={"group": group, "topic": tp.topic, "error": error.__name__})

    def _fail(self, error: Exception) -> None:
        # The next question begins with a new connection and without what this one had cached.
        self._drop()
        with self._changed:
            self._last_error = str(error)
            if self._up is not False:
                servers = self._configs["bootstrap_servers"]
                logger.warning("the brokers do not answer", extra={"servers": servers, "error": str(error)})
            self._up = False
        UP.set(0)

    def _drop(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            admin.close()


def _creation(topic: Topic) -> dict[str, Any]:
    configs = {"max.message.bytes": str(MAX_MESSAGE_BYTES)}
    if topic.compacted:
        configs["cleanup.policy"] = "compact"
    return {"num_partitions": topic.partitions, "replication_factor": topic.replication, "configs": configs}
