"""The stream: `open_log` gives the log that a deployment's brokers hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thumbwheel.stream.log import Log

if TYPE_CHECKING:
    from thumbwheel.tls import ClientTls


def open_log(bootstrap_servers: str, tls: ClientTls | None = None) -> Log:
    """The log of these Kafka brokers, "host:port,host:port". Does not wait for them to be there.

    Raises `errors.FailedPrecondition` for a file of `tls` that cannot be used.
    """
    # Here, so that what only needs the interface or the in-memory log does not load a Kafka client.
    from thumbwheel.stream.kafka import KafkaLog

    return KafkaLog(bootstrap_servers, tls=tls)
