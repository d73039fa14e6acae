"""The collector against what bounds it: acknowledged feedback, latency of an acknowledgement, and the relay.

    make bench-collector ARGS="--rounds 7 --votes 3000"

The collector is the real process; clients are one other process. Votes are comparisons whose responses are there, so
each is joined and curated, and leaves two events in the outbox; ten of them come to a prompt, as in `bench.curation`.
An acknowledgement says that a vote is in the inbox, durably; recording and curating it follow, in a process of the
collector's beside. Peers, one round each beside each round of ours, once all of that is done:

    ack_vs_bare_*       the inbox's rows of that very round, through the database's driver, in commits as large as the
                        collector's were on average; no gRPC, no checks, no lookups, no library above the driver
    batched_vs_bare_*   the same, where clients send votes in batches of 64
    ack_vs_echo         a unary gRPC echo of the same messages, by the same clients
    ack_p99_vs_commit   at half of that round's rate, requests at random times; the peer is one vote's row a commit.
                        `echo_p99_vs_commit` is the same of the echo: what gRPC takes of it, with nothing made durable
    curated_vs_acked    votes recorded, joined and curated a second, from the first acknowledgement to the last event in
                        the outbox; the peer is the rate at which that round was acknowledged. On two cores the clients
                        go first, and most of it happens after the burst
    relay_vs_bare       after a broker's loss all is published again; the peer is a kafka-python producer, set alike,
                        that sends the same records to the same broker

While acknowledgements are measured the broker is away, as the relay would share the clients' two cores; how much it
takes when it is there is `ack_while_relaying`, the rate with it over the rate without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.collector_clients import write_requests
from bench.collector_peers import ECHO, Event, Plain, Rows, groups, produce
from bench.harness import Ratio, Target, percentile, report, rounds
from services.collector.database import Database
from services.collector.inbox import Waiting
from services.collector.sqlite import inbox_path
from tests.faults.observe import Query, postgres_query, sqlite_query
from tests.postgres import Postgres
from tests.support import Process, free_port
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Topic
from thumbwheel.v1.preference_pb2 import Feedback, SubmitFeedbackBatchRequest, SubmitFeedbackRequest

SUBMIT = "/thumbwheel.v1.PreferenceService/SubmitFeedback"
SUBMIT_BATCH = "/thumbwheel.v1.PreferenceService/SubmitFeedbackBatch"
BATCH = 64
"""Votes of a batch."""
BATCHED = 3
"""Times as many votes where they come in batches, which go in faster."""
CLIENTS = 64
VOTES_A_PROMPT = 10
_WORDS = "a plain answer of some length that says what there is to say and then stops for good "
_SECONDS = 300.0
_INBOX = Waiting._fields[:-1]
"""The columns of the inbox, but the one that the database fills in."""


@dataclass
class Service:
    """A collector on one database, its broker, and votes that nobody has cast yet."""

    home: Path
    database: str
    pairs: int
    votes: int = 0
    postgres: Postgres | None = None
    broker: EmbeddedBroker = field(init=False)

    def __post_init__(self) -> None:
        self.deployment = Deployment.at(self.home)
        self.broker = EmbeddedBroker(port=free_port(), log=self.home / "broker.log")
        arguments = ["--home", str(self.home), "--bootstrap-servers", self.broker.bootstrap_servers]
        arguments += ["--control-listen", "127.0.0.1:0"]
        if self.database == "postgres":
            self.postgres = Postgres().start()
            arguments += ["--database", self.postgres.url]
        self.process = Process("services.collector", arguments, self.home / "collector.log")
        self.pool = [self.deployment.pair(f"{_WORDS * 2}{i}", f"{_WORDS * 3}{i}") for i in range(self.pairs)]

    @property
    def query(self) -> Query:
        """Plain SQL."""
        if self.postgres is not None:
            return postgres_query(self.postgres.conninfo)
        return sqlite_query(self.home / "collector.db")

    def start(self) -> None:
        """Starts it, and lets it take in what will be voted on; then the broker goes."""
        self.broker.start()
        self.process.start().wait_serving()
        log = open_log(self.broker.bootstrap_servers)
        producer = log.producer()
        for pair in self.pool:
            for event in pair:
                key = event.generation.prompt_id.encode()
                producer.send(topics.GENERATIONS, key, event.SerializeToString())
            producer.flush(_SECONDS)
        self.until("SELECT count(*) FROM generations", 2 * self.pairs)
        producer.close(1.0)
        log.close()
        self.broker.kill()

    def until(self, sql: str, value: int) -> None:
        """Waits until this is the answer."""
        deadline = time.monotonic() + _SECONDS
        while self.query(sql) != [(value,)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{sql}: not {value}")
            time.sleep(0.1)

    def until_recorded(self) -> None:
        """Waits until all that was voted is recorded and curated."""
        self.until("SELECT count(*) FROM feedback", self.votes)

    def requests(self, count: int) -> Path:
        """A file of requests with a vote each."""
        return self._written([SubmitFeedbackRequest(feedback=vote) for vote in self._cast(count)])

    def batches(self, count: int) -> Path:
        """A file of requests with so many votes in all."""
        votes = self._cast(count)
        return self._written(
            [SubmitFeedbackBatchRequest(feedback=votes[at : at + BATCH]) for at in range(0, count, BATCH)]
        )

    def _cast(self, count: int) -> list[Feedback]:
        """Votes, each by a user who has not judged that pair."""
        first, self.votes = self.votes, self.votes + count
        return [
            parts.comparison(*self.pool[number % self.pairs], key=f"key-{number}", user=f"user-{number}")
            for number in range(first, self.votes)
        ]

    def _written(self, requests: Sequence[SubmitFeedbackRequest | SubmitFeedbackBatchRequest]) -> Path:
        path = self.home / "requests"
        write_requests(path, [request.SerializeToString() for request in requests])
        return path

    def commit_size(self) -> tuple[float, float]:
        """Writes and commits so far."""
        url = f"http://127.0.0.1:{self.process.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("thumbwheel_collector_commit_writes_"))
        return tuple(float(found[f"thumbwheel_collector_commit_writes_{name}"]) for name in ("sum", "count"))  # type: ignore[return-value]  # two names, two values

    def close(self) -> None:
        """Ends all of it."""
        self.process.kill()
        self.broker.kill()
        if self.postgres is not None:
            self.postgres.remove()


def send(address: str, method: str, file: Path, rate: float = 0.0) -> tuple[float, list[float]]:
    """Requests a second, and the latencies, of the client process."""
    command = [sys.executable, "-m", "bench.collector_clients", address, method, str(file)]
    run = subprocess.run(
        [*command, "--clients", str(CLIENTS), "--rate", str(rate)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=_SECONDS,
    )
    said = json.loads(run.stdout)
    return said["requests"] / said["seconds"], said["latencies"]


class Written:
    """Reads what a round has written, and has a plain connection to a like database beside it."""

    def __init__(self, service: Service) -> None:
        self._query = service.query
        url = f"sqlite:///{service.home / 'bare.db'}"
        target: Path | str = inbox_path(service.home / "bare.db")
        if service.postgres is not None:
            with contextlib.closing(_psycopg(service.postgres.conninfo)) as connection:
                connection.execute("CREATE DATABASE bare")
            url = service.postgres.url.replace("/postgres", "/bare")
            target = service.postgres.conninfo.replace("dbname=postgres", "dbname=bare")
        Database(url).close()  # makes the tables
        self.plain = Plain(target, _INBOX)
        self._last = ""

    def rows(self) -> Rows:
        """What the inbox held of the votes since the last call. They are recorded by now, with all that it held."""
        columns = ", ".join("''" if name == "traceparent" else name for name in _INBOX)
        rows = self._query(f"SELECT {columns} FROM feedback WHERE feedback_id > '{self._last}' ORDER BY feedback_id")
        self._last = rows[-1][0] if rows else self._last
        return rows

    def curated(self, rows: Rows) -> float:
        """Of these, how many were recorded a second: from the first one's coming to the last event of any."""
        first = min(row[_INBOX.index("received_at")] for row in rows)
        [[last]] = self._query("SELECT max(created_at) FROM outbox")
        return float(len(rows) / ((last - first) / 1e6))


def _psycopg(conninfo: str) -> Any:
    import psycopg

    return psycopg.connect(conninfo, autocommit=True)


@dataclass
class Bench:
    """One service, and its ratios."""

    service: Service
    written: Written
    count: int
    ratios: Mapping[str, Ratio]
    echo_address: str = ""
    rate: float = 0.0

    def acknowledge(self) -> None:
        """The rate of acknowledgements, then the same rows without all that."""
        file = self.service.requests(self.count)
        self.rate, rows = self._beside_bare("bare", SUBMIT, file)
        self.ratios["curated"].add(self.written.curated(rows), self.rate)
        if self.echo_address:
            self.ratios["echo"].add(self.rate, send(self.echo_address, ECHO, file)[0])

    def acknowledge_batches(self) -> None:
        """The same, of votes that come in batches."""
        self._beside_bare("batched", SUBMIT_BATCH, self.service.batches(self.count * BATCHED // BATCH * BATCH), BATCH)

    def _beside_bare(self, ratio: str, method: str, file: Path, votes: int = 1) -> tuple[float, Rows]:
        """The rate at which votes in a file, so many a request, are acknowledged, and their rows."""
        self.written.rows()  # what came since is not of this round
        writes, commits = self.service.commit_size()
        requests, _ = send(self.service.process.address, method, file)
        writes_after, commits_after = self.service.commit_size()
        size = max(1, round((writes_after - writes) / (commits_after - commits)))
        self.service.until_recorded()
        rows = self.written.rows()
        work = list(groups(rows, size))
        began = time.perf_counter()
        for group in work:
            self.written.plain.commit(group)
        self.ratios[ratio].add(requests * votes, len(rows) / (time.perf_counter() - began))
        return requests * votes, rows

    def respond(self) -> None:
        """The latency at half of the rate, then that of a commit of one vote."""
        rate = self.rate / 2
        count = min(self.count, max(200, int(rate * 5)))
        self.written.rows()
        file = self.service.requests(count)
        _, latencies = send(self.service.process.address, SUBMIT, file, rate)
        self.service.until_recorded()
        commits = []
        for group in groups(self.written.rows(), 1):
            began = time.perf_counter()
            self.written.plain.commit(group)
            commits.append(time.perf_counter() - began)
        commit = 1e3 * percentile(commits, 0.99)
        self.ratios["latency"].add(1e3 * percentile(latencies, 0.99), commit)
        _, echoes = send(self.echo_address, ECHO, file, rate)
        self.ratios["echo_latency"].add(1e3 * percentile(echoes, 0.99), commit)

    def publish(self) -> None:
        """Votes while the relay works, then all of the outbox after the broker's loss, then the same by a producer."""
        broker = self.service.broker
        broker.start()
        rate, _ = send(self.service.process.address, SUBMIT, self.service.requests(self.count))
        self.ratios["relaying"].add(rate, self.rate)
        self.service.until_recorded()
        self._until_published()
        broker.kill()
        broker.start()
        self._until_published(again=True)
        bursts = self.service.query("SELECT published_at, count(*) FROM outbox GROUP BY published_at ORDER BY 1")
        seconds = (bursts[-1][0] - bursts[0][0]) / 1e6
        ours = sum(count for _, count in bursts[1:]) / seconds
        self.ratios["relay"].add(ours, produce(broker.bootstrap_servers, self._events()))
        broker.kill()

    def _until_published(self, *, again: bool = False) -> None:
        if again:
            deadline = time.monotonic() + _SECONDS
            while self.service.query("SELECT count(*) FROM outbox WHERE published_at IS NULL") == [(0,)]:
                assert time.monotonic() < deadline, "the loss was not noticed"
                time.sleep(0.02)
        self.service.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0)

    def _events(self) -> list[Event]:
        log = open_log(self.service.broker.bootstrap_servers)
        log.ensure_topics([Topic("bare.feedback"), Topic("bare.comparisons")], 30.0)
        log.close()
        found = self.service.query("SELECT topic, key, value, event_id, schema FROM outbox ORDER BY id")
        return [
            Event(
                "bare.feedback" if topic == topics.FEEDBACK else "bare.comparisons",
                bytes(key),
                bytes(value),
                [("schema", schema.encode()), ("event_id", event_id.encode())],
            )
            for topic, key, value, event_id, schema in found
        ]


@contextlib.contextmanager
def running(database: str, pairs: int) -> Iterator[Service]:
    """A service that has taken in its responses."""
    with tempfile.TemporaryDirectory(prefix="thumbwheel-bench-") as folder:
        service = Service(Path(folder), database, pairs)
        try:
            service.start()
            yield service
        finally:
            service.close()


@contextlib.contextmanager
def echoing() -> Iterator[str]:
    """Address of an echo."""
    echo = subprocess.Popen([sys.executable, "-m", "bench.collector_peers"], stdout=subprocess.PIPE, text=True)
    assert echo.stdout is not None
    try:
        yield f"127.0.0.1:{echo.stdout.readline().strip()}"
    finally:
        echo.kill()
        echo.wait()
        echo.stdout.close()


def measure(database: str, count: int, runs: int) -> list[Ratio]:
    """All ratios on SQLite; on PostgreSQL those in which it differs."""
    ratios = {
        "bare": Ratio(f"ack_vs_bare_{database}", "acks/s", Target(least=0.5)),
        "batched": Ratio(f"batched_vs_bare_{database}", "acks/s", Target(least=0.5)),
        "echo": Ratio("ack_vs_echo", "acks/s", Target(least=0.6)),
        "latency": Ratio("ack_p99_vs_commit", "ms", Target(most=3.0)),
        "echo_latency": Ratio("echo_p99_vs_commit", "ms"),
        "curated": Ratio(f"curated_vs_acked_{database}", "votes/s"),
        "relaying": Ratio("ack_while_relaying", "acks/s"),
        "relay": Ratio("relay_vs_bare", "events/s", Target(least=0.9)),
    }
    # In a round they are cast by three steps on SQLite, by one on PostgreSQL, and in batches; and once before all.
    votes = count * (1 + runs * (BATCHED + (3 if database == "sqlite" else 1)))
    with running(database, pairs=max(1, votes // VOTES_A_PROMPT)) as service, echoing() as echo:
        bench = Bench(service, Written(service), count, ratios, echo if database == "sqlite" else "")
        steps = {"acknowledge": bench.acknowledge, "acknowledge batches": bench.acknowledge_batches}
        if database == "sqlite":
            steps |= {"respond": bench.respond, "publish": bench.publish}
        bench.acknowledge()  # caches, and SQLAlchemy's statements
        for ratio in ratios.values():
            ratio.ours.clear()
            ratio.peer.clear()
        rounds(runs, steps)
        bench.written.plain.close()
    return [ratio for ratio in ratios.values() if ratio.ours]


def curation() -> dict[str, float]:
    """The ratios of `bench.curation`, which is run, where it is there."""
    if find_spec("bench.curation") is None:
        return {}
    run = subprocess.run([sys.executable, "-m", "bench.curation"], check=True, stdout=subprocess.PIPE, text=True)
    print(run.stdout, end="")
    ratios: dict[str, float] = json.loads(run.stdout.splitlines()[-1])["ratios"]
    return ratios


def main() -> None:
    """Parses the arguments, measures and reports."""
    parser = argparse.ArgumentParser(prog="make bench-collector", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--votes", type=int, default=3_000, help="a round (default %(default)s)")
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--no-curation", action="store_true", help="leave out bench.curation, which takes minutes")
    given = parser.parse_args()
    databases = ["sqlite", "postgres"] if given.database == "both" else [given.database]
    ratios = [ratio for name in databases for ratio in measure(name, given.votes, given.rounds)]
    report("collector", ratios, given.rounds, also={} if given.no_curation else curation())


if __name__ == "__main__":
    main()
