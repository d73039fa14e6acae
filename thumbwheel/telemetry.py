"""What a process tells operators: structured logs on standard error, and Prometheus metrics over HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Info, start_http_server

from thumbwheel import errors

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}

BUILD = Info("thumbwheel_build", "What runs here.")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is passed as `extra=` becomes keys of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line of JSON."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def setup_logging(process: str, level: str) -> None:
    """Sends all logs of this process to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("kafka").setLevel(logging.WARNING)


@contextlib.contextmanager
def metrics_server(port: int, *, process: str, host: str = "127.0.0.1") -> Iterator[int]:
    """Serves this process's metrics at http://host:port/metrics from a thread. Yields the port.

    Raises `errors.PortInUse`.
    """
    from importlib.metadata import version

    BUILD.info({"process": process, "version": version("thumbwheel")})
    try:
        server, thread = start_http_server(port, addr=host)
    except OSError as error:
        raise errors.PortInUse(
            f"{process} cannot serve metrics on {host}:{port}: {error.strerror}.",
            remedy="Choose another port with --metrics-port, or stop the process that has it.",
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)
