"""A stage of the collector in a process of its own, started when it is first needed, and again when it has ended.

    ask ──question──▶ the stage ──answer, or the error that it raised──▶ ask

The two sides talk through a pair of sockets that nobody else has. The process ends when its side is closed, and so with
whoever started it, however that ended. It is `python -m services.collector.child STAGE SOCKET`, STAGE being a module
whose `opened` makes, of what it is sent first, what answers the questions.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

from thumbwheel import errors

logger = logging.getLogger("services.collector.child")  # it is run by that name

ANSWER_SECONDS = 60.0
"""Longest that an answer may take; the first one starts the process, and with it opens the database."""
_MESSAGE_SECONDS = 10
"""Longest that a message may stand still on its way to the process, or from it."""
_CLOSE_SECONDS = 10.0


class Child:
    """The process of a stage, which is sent `order` first. Thread-safe."""

    def __init__(self, stage: str, order: Any) -> None:
        self._stage = stage
        self._order = order
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._turn = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Its id; None where it does not run."""
        return None if self._process is None else self._process.pid

    def ask(self, question: Any) -> Any:
        """Its answer. Raises what the stage raised, and `errors.Unavailable` where it ends or does not answer: what it
        was asked may have been done.
        """
        with self._turn:
            try:
                connection = self._started()
                connection.send(question)
                if not connection.poll(ANSWER_SECONDS):
                    raise TimeoutError(f"none within {ANSWER_SECONDS:g} s")
                answer = connection.recv()
            except (OSError, EOFError) as error:
                self._kill()
                logger.warning("a stage gave no answer", extra={"stage": self._stage, "error": str(error)})
                raise errors.Unavailable(
                    f"The process of {self._stage} gave no answer: {error or 'it has ended'}.",
                    remedy="It is started again; the collector's log says what it met.",
                ) from error
        if isinstance(answer, errors.ThumbwheelError):
            raise answer
        return answer

    def close(self) -> None:
        """Lets it finish what it does, and ends it."""
        with self._turn:
            if self._process is None or self._connection is None:
                return
            self._connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
            self._kill()

    def _started(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        if self._connection is None:
            self._connection, theirs = multiprocessing.Pipe()
            _limit(self._connection)
            with theirs:
                command = [sys.executable, "-m", __name__, self._stage, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            self._connection.send(self._order)
        return self._connection

    def _kill(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()


def _limit(connection: Connection) -> None:
    """Has reading and writing fail where the other side stands still in the middle of a message."""
    with socket.socket(fileno=os.dup(connection.fileno())) as pair:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            pair.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _MESSAGE_SECONDS, 0))


def serve(opened: Callable[[Any], AbstractContextManager[Callable[[Any], Any]]], connection: Connection) -> None:
    """Answers whoever started this process, until that goes away.

    What cannot be opened is the answer to the first question, and ends this process; so does, unanswered, any exception
    but a `ThumbwheelError`.
    """
    order = connection.recv()
    try:
        with opened(order) as answer:
            while True:
                connection.send(_said(answer, connection.recv()))
    except errors.ThumbwheelError as error:
        logger.critical("%s", error)
        connection.recv()
        connection.send(error)
        raise SystemExit(1) from None


def _said(answer: Callable[[Any], Any], question: Any) -> Any:
    try:
        return answer(question)
    except errors.ThumbwheelError as error:
        return error


def main() -> None:
    """Serves a stage."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # sent to all of a terminal or container: it ends with its parent
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError), Connection(int(sys.argv[2])) as connection:
        serve(importlib.import_module(sys.argv[1]).opened, connection)


if __name__ == "__main__":
    main()
