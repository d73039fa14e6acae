"""kafka-python as the rest of this package uses it: imported without a warning, quiet, and without leaking threads."""

from __future__ import annotations

import logging
import socket
import ssl
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from thumbwheel.tls import ClientTls

with warnings.catch_warnings():
    # It reads its schemas with a function that Python 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import kafka
    import kafka.structs
    from kafka import errors
    from kafka.net.compat import KafkaNetClient
    from kafka.net.inet import KafkaNetSocket

__all__ = ["MAX_MESSAGE_BYTES", "client", "errors", "kafka", "longest_silence"]

MAX_MESSAGE_BYTES = 2 * 1024 * 1024
"""Largest record; topics are created with it."""

_SILENT_REQUESTS = 2.0

_NOISY = ("net.transport", "net.connection", "net.manager", "cluster", "consumer.fetcher", "producer.sender")
_NOISE_SECONDS = 60.0


_sockets: weakref.WeakKeyDictionary[Any, weakref.WeakSet[socket.socket]] = weakref.WeakKeyDictionary()


class _Socket(KafkaNetSocket):  # type: ignore[misc]  # kafka-python is not typed
    """Connects without a proxy, as the default does, and notes the socket for `_Network` to close.

    kafka-python finds the class by the scheme of `proxy_url`.
    """

    SCHEMES = ("direct",)

    async def sock_connect(self, net: Any, sock: socket.socket, sockaddr: Any, timeout_at: float | None = None) -> Any:
        _sockets.setdefault(net, weakref.WeakSet()).add(sock)
        try:
            return await super().sock_connect(net, sock, sockaddr, timeout_at=timeout_at)
        except BaseException:
            sock.close()
            raise


class _Network(KafkaNetClient):  # type: ignore[misc]
    """Closes its sockets, also those whose connections were being made, or did not answer, when it was closed.

    Never has a broker make a topic: kafka-python takes `allow_auto_create_topics` and forgets it on the way to where it
    counts. A topic that comes into being because somebody asked for it has any number of partitions, and what was on
    its way to one that was lost would be the first record of the new one, before all that is older.

    Connects within the time of one request, for which its clients take no setting: else an attempt that was begun while
    the network was away, and the last of several, is waited for 36 s.
    """

    def __init__(self, **configs: Any) -> None:
        most = configs["request_timeout_ms"]
        super().__init__(
            **configs | {"socket_connection_setup_timeout_ms": most, "socket_connection_setup_timeout_max_ms": most}
        )
        self.cluster.config["allow_auto_create_topics"] = False

    def heard_at(self) -> float:
        """When a broker last said anything, by the monotonic clock; 0 without a connection."""
        transports = [connection.transport for connection in list(self._manager._conns.values())]
        return max((transport.last_read for transport in transports if transport is not None), default=0.0)

    def close(self, node_id: Any = None) -> None:
        if node_id is None:
            self._net.stop()  # or its thread might go on to read from a socket that this one closes
        super().close(node_id=node_id)
        if node_id is None:
            for sock in list(_sockets.pop(self._net, ())):
                sock.close()


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when it is let go of: kafka-python forgets those whose handshake failed."""

    def __del__(self) -> None:
        self.close()


def _tls_context(tls: ClientTls) -> ssl.SSLContext:
    """Read anew for each client, so that renewed certificates are taken up whenever one is made."""
    tls.read()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


class _Sparing(logging.Filter):
    """Lets a message through once a minute: the client reports each of many attempts to connect a second."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, str(record.msg)), time.monotonic()
        if now - self._last.get(key, -_NOISE_SECONDS) < _NOISE_SECONDS:
            return False
        self._last[key] = now
        return True


_sparing = _Sparing()


def longest_silence(configs: Mapping[str, Any]) -> float:
    """Seconds for which a client that waits may hear nothing while brokers answer others: as two requests may take."""
    return float(_SILENT_REQUESTS * configs["request_timeout_ms"] / 1000)


def client(make: Callable[..., Any], *, tls: ClientTls | None = None, **configs: Any) -> Any:
    """Makes a Kafka client. Where it cannot reach a broker it raises, and the thread it had begun is ended."""
    if tls is not None:
        configs |= {"security_protocol": "SSL", "ssl_context": _tls_context(tls)}
    for name in _NOISY:
        logging.getLogger(f"kafka.{name}").addFilter(_sparing)  # adding it twice adds it once
    begun: list[_Network] = []

    def network(**given: Any) -> _Network:
        begun.append(_Network(**given))
        return begun[-1]

    try:
        return make(kafka_client=network, proxy_url="direct://", **configs)
    except BaseException:
        for each in begun:
            each.close()
        raise
