"""A collector with its broker and its database, all real processes, each of which can be killed at any time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import observe
from tests.faults.checker import Delivery, Entry, History
from tests.faults.clock import Clock
from tests.faults.observe import Query, Reader
from tests.faults.proxy import Proxy
from tests.postgres import Postgres
from tests.support import Process, free_port
from tests.unit.services.collector.parts import Deployment
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log, Position
from thumbwheel.v1.events_pb2 import GenerationEvent

START_SECONDS = 60.0
_SEND_SECONDS = 30.0


@dataclass
class Cluster:
    """Everything but the clients. `life` counts the lives of the broker; SQLite's file is on `disk`, if given."""

    home: Path
    postgres: Postgres | None
    options: Sequence[str] = ()
    disk: Path | None = None
    proxied: bool = False
    """Whether all goes through `links` (of the clients, to the broker, to the database), and its `clock` can jump."""
    deployment: Deployment = field(init=False)
    links: dict[str, Proxy] = field(default_factory=dict)
    stream: list[Delivery] = field(default_factory=list)
    life: int = 0
    clock: Clock | None = None

    def __post_init__(self) -> None:
        self.deployment = Deployment.at(self.home)
        port = free_port()
        if self.proxied:
            self.links["broker"] = Proxy(port)
        advertised = self.links["broker"].address if self.proxied else ""
        self.broker = EmbeddedBroker(port=port, log=self.home / "broker.log", advertised=advertised)
        arguments = ["--home", str(self.home), "--bootstrap-servers", self.broker.bootstrap_servers]
        arguments += ["--control-listen", "127.0.0.1:0"]
        self.file = (self.disk or self.home) / "collector.db"
        url = f"sqlite:///{self.file}"
        if self.postgres is not None:
            url = self.postgres.url
            if self.proxied:
                self.links["database"] = Proxy(self.postgres.port)
                url = url.replace(f":{self.postgres.port}/", f":{self.links['database'].port}/")
        arguments += ["--database", url, *self.options]
        self.collector = Process("services.collector", arguments, self.home / "collector.log")
        if self.proxied:
            self.links["clients"] = Proxy(self.collector.port)
            self.clock = Clock(self.home)
            self.collector.environment = self.clock.environment
        self._log: Log = open_log(self.broker.bootstrap_servers)
        self._policy = self._log.producer()
        self._sent: list[Future[Position]] = []
        self.reader: Reader | None = None

    @property
    def query(self) -> Query:
        """Plain SQL on the database."""
        if self.postgres is not None:
            return observe.postgres_query(self.postgres.conninfo)
        return observe.sqlite_query(self.file)

    @property
    def address(self) -> str:
        """Where clients reach the collector."""
        return self.links["clients"].address if self.proxied else self.collector.address

    def start(self) -> None:
        """Starts all that does not run; returns when the collector serves."""
        for link in self.links.values():
            link.__enter__()
        if self.postgres is not None:
            self.postgres.start()
        self.start_broker()
        self.start_collector()

    def start_broker(self) -> None:
        """A new life of the broker, which remembers nothing."""
        self.life += 1
        self.broker.start()
        self.reader = Reader(self.broker.bootstrap_servers, self.life, self.stream)

    def start_collector(self) -> None:
        """Returns when it serves."""
        self.collector.start().wait_serving(START_SECONDS)

    def kill_broker(self) -> None:
        """It loses all that it held."""
        self.broker.kill()
        if self.reader is not None:
            self.reader.stop()

    def publish(self, events: Sequence[GenerationEvent]) -> None:
        """Publishes what the policy served, as the policy does: without waiting."""
        self._sent = [future for future in self._sent if not future.done()]
        for event in events:
            key = event.generation.prompt_id.encode()
            self._sent.append(self._policy.send(topics.GENERATIONS, key, event.SerializeToString()))

    def history(self, journal: Sequence[Entry]) -> History:
        """What there is to check, once it has settled."""
        assert self.reader is not None
        self.reader.read_to_end(_SEND_SECONDS)
        rows, events = observe.feedback_rows(self.query), observe.outbox_rows(self.query)
        stream = list(self.stream)
        return History(journal, stream, rows, events, observe.FEEDBACK, observe.COMPARISONS, self.life)

    def close(self) -> None:
        """Ends all of it."""
        if self.reader is not None:
            self.reader.stop()
        self.collector.kill()
        with contextlib.suppress(Exception):  # the broker may be gone: what was to be sent does not matter any more
            self._policy.close(1.0)
        self._log.close()
        self.broker.kill()
        if self.postgres is not None:
            self.postgres.remove()
        for link in self.links.values():
            link.__exit__()


@contextlib.contextmanager
def cluster(
    database: str,
    options: Sequence[str] = (),
    disk: Path | None = None,
    *,
    proxied: bool = False,
    home: Path | None = None,
) -> Iterator[Cluster]:
    """A cluster on "sqlite" or "postgres", started, and gone at the end with all that it wrote."""
    with tempfile.TemporaryDirectory(prefix="thumbwheel-faults-") as folder:
        postgres = Postgres() if database == "postgres" else None
        made = Cluster(home or Path(folder), postgres, options, disk, proxied)
        try:
            made.start()
            yield made
        finally:
            made.close()
