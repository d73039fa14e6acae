"""The embedded broker, inside a process and as one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import free_port
from thumbwheel import errors
from thumbwheel.stream.broker import EmbeddedBroker, main, supervise
from thumbwheel.stream.kafka import KafkaLog
from thumbwheel.stream.log import Topic

SECONDS = 15.0


def answers(port: int) -> bool:
    log = KafkaLog(f"127.0.0.1:{port}")
    try:
        log.topic_ids([], SECONDS)
        return True
    except errors.Unavailable:
        return False
    finally:
        log.close()


def test_it_answers_when_it_has_started_and_is_gone_when_stopped(tmp_path: Path) -> None:
    with EmbeddedBroker(port=0, log=tmp_path / "logs" / "broker.log") as broker:
        assert broker.bootstrap_servers == f"127.0.0.1:{broker.port}"
        assert answers(broker.port)
        pid = broker.pid
        assert pid is not None
        assert broker.wait(0.0) is None
    assert broker.pid is None
    assert not psutil.pid_exists(pid)
    assert broker.wait(0.0) is not None
    assert "listening on" in broker.log.read_text()


def test_it_stops_in_time_though_clients_are_connected(tmp_path: Path) -> None:
    with EmbeddedBroker(port=0, log=tmp_path / "broker.log") as broker:
        log = KafkaLog(broker.bootstrap_servers)
        log.ensure_topics([Topic("t")], SECONDS)
        began = time.monotonic()
        broker.stop()
        assert time.monotonic() - began < 3.0
        log.close()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.PortInUse, match=rf"Port {port} .*--listen"):
            EmbeddedBroker(port=port, log=tmp_path / "broker.log").start()
    assert not (tmp_path / "broker.log").exists()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"listen: .*192\.0\.2\.1:19092"):
        EmbeddedBroker(host="192.0.2.1", port=19092, log=tmp_path / "broker.log").start()


def test_a_broker_that_ends_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broker"
    program.write_text("#!/bin/sh\necho no memory for $1 today\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("CALF_TANSU_BIN", str(program))
    with pytest.raises(errors.FailedPrecondition, match=r"status 7 .*no memory for broker today.*broker\.log"):
        EmbeddedBroker(port=0, log=tmp_path / "broker.log").start()


def test_a_broker_that_never_listens_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broker"
    program.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("CALF_TANSU_BIN", str(program))
    broker = EmbeddedBroker(port=0, log=tmp_path / "broker.log")
    with pytest.raises(errors.DeadlineExceeded, match="does not answer"):
        broker.start(0.5)
    assert broker.pid is None


def test_a_machine_without_a_broker_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALF_TANSU_BIN", str(tmp_path / "missing"))
    with pytest.raises(errors.FailedPrecondition, match="Run Apache Kafka"):
        EmbeddedBroker(port=0, log=tmp_path / "broker.log").start()


class Wrapper:
    """`python -m thumbwheel.stream.broker` on free ports."""

    def __init__(self, folder: Path) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.output = folder / "wrapper.log"
        arguments = ["--listen", f"127.0.0.1:{self.port}", "--log", str(folder / "broker.log")]
        arguments += ["--metrics-port", str(self.metrics_port)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "thumbwheel.stream.broker", *arguments], stdout=output, stderr=output
            )
        assert answers(self.port), self.output.read_text()
        (self.child,) = psutil.Process(self.process.pid).children()


@pytest.fixture
def wrapper(tmp_path: Path) -> Iterator[Wrapper]:
    started = Wrapper(tmp_path)
    yield started
    started.process.kill()
    started.process.wait()


def test_the_process_serves_metrics_and_stops_cleanly(wrapper: Wrapper) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{wrapper.metrics_port}/metrics", timeout=SECONDS) as answer:
            text = answer.read().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        if float(values.get("thumbwheel_stream_broker_resident_bytes", 0)) > 1e6:
            break
        assert time.monotonic() < deadline, text
    wrapper.process.send_signal(signal.SIGTERM)
    assert wrapper.process.wait(SECONDS) == 0
    assert not wrapper.child.is_running()


def test_a_broker_that_died_before_it_is_watched_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker(port=free_port(), log=tmp_path / "broker.log") as broker:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        assert broker.wait(SECONDS) == -signal.SIGKILL
        assert supervise(broker, threading.Event()) == 1
    assert "the broker ended with status -9" in caplog.text


def test_the_process_ends_and_says_why_when_the_broker_dies(wrapper: Wrapper) -> None:
    wrapper.child.kill()
    assert wrapper.process.wait(SECONDS) == 1
    assert "broker ended with status -9" in wrapper.output.read_text()  # perhaps "while starting"


def test_the_broker_does_not_outlive_the_process(wrapper: Wrapper) -> None:
    wrapper.process.kill()
    wrapper.process.wait(SECONDS)
    _, alive = psutil.wait_procs([wrapper.child], SECONDS)
    assert alive == []


def test_the_process_does_not_outlive_its_parent(tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "thumbwheel.stream.broker", "--listen", f"127.0.0.1:{port}"]
    command += ["--log", str(tmp_path / "broker.log"), "--metrics-port", str(metrics_port)]
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL).wait()"
    parent = subprocess.Popen([sys.executable, "-c", program, *command])
    assert answers(port)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, SECONDS)
    assert alive == []


def test_the_process_reports_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "thumbwheel.stream.broker", "--listen", f"127.0.0.1:{port}"]
        command += ["--log", str(tmp_path / "broker.log"), "--metrics-port", str(free_port())]
        ended = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert ended.returncode == 1
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr.decode()


def test_help_is_quick_and_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--metrics-port" in capsys.readouterr().out
