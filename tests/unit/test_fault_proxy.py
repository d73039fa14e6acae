"""The proxy fails the ways that it says, while connections are open, and heals."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import FAULTS, Proxy

_SECONDS = 5.0


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says everything again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                while data := connection.recv(1000):
                    connection.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(echo, seed=1) as made:
        yield made


def _connect(proxy: Proxy, timeout: float = _SECONDS) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout)


def _says(connection: socket.socket, text: bytes = b"hello") -> bytes:
    connection.sendall(text)
    return connection.recv(1000)


def test_it_passes_everything_on_both_ways(proxy: Proxy) -> None:
    with _connect(proxy) as one, _connect(proxy) as other:
        assert (_says(one, b"one"), _says(other, b"other")) == (b"one", b"other")
        assert proxy.connections == 2


def test_a_delay_is_that_of_a_round_trip(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        _says(connection)
        with proxy.failing("delay", 0.4):
            began = time.monotonic()
            assert _says(connection) == b"hello"
            assert 0.4 <= time.monotonic() - began < 2.0


def test_what_is_lost_comes_later_and_once(proxy: Proxy) -> None:
    with _connect(proxy) as connection, proxy.failing("loss", 0.1):
        took = []
        for number in range(40):
            began = time.monotonic()
            assert _says(connection, b"%d" % number) == b"%d" % number
            took.append(time.monotonic() - began)
    assert 5 <= sum(one >= 0.1 for one in took) <= 30


@pytest.mark.parametrize("fault", ["half-open", "partition"])
def test_silence_is_no_end_until_it_heals(proxy: Proxy, fault: str) -> None:
    with _connect(proxy, timeout=0.3) as connection:
        _says(connection)
        proxy.begin(fault)  # type: ignore[arg-type]  # parametrized
        with pytest.raises(TimeoutError):
            _says(connection)
        with _connect(proxy, timeout=0.3) as another, pytest.raises(TimeoutError):
            _says(another)
        proxy.heal()
        connection.settimeout(_SECONDS)
        with pytest.raises(ConnectionError):
            _says(connection)
    with _connect(proxy) as connection:
        assert _says(connection) == b"hello"


def test_a_reset_is_told_at_once_also_to_who_comes(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        _says(connection)
        with proxy.failing("reset"):
            with pytest.raises(ConnectionResetError):
                connection.recv(10)
            with contextlib.suppress(ConnectionError), _connect(proxy) as another:
                assert _says(another) == b""
    with _connect(proxy) as connection:
        assert _says(connection) == b"hello"


def test_all_faults_are_known() -> None:
    assert FAULTS == ("delay", "loss", "half-open", "partition", "reset")
