"""Sets up `.venv` from nothing: `make setup`. Needs nothing but Python 3.11.

    .venv ──▶ torch.lock ──▶ cpu.lock (wheels, hashed) ──▶ source.lock (built here, hashed) ──▶ the project, editable

A finished step leaves a stamp with the digest of what it installed, so that a repetition does only what changed, and an
interrupted set-up goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / ".setup"
TOOLS = VENV / "tools"
LOG = VENV / "setup.log"

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
SPACE_NEEDED_GIB = 5
TOLD_EVERY_SECONDS = 15.0


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """A part of the set-up. `inputs` is the text it follows from; `run` does it and may be repeated."""

    name: str
    inputs: str
    run: Callable[[], None]

    @property
    def digest(self) -> str:
        """Changes when the step has to be done again."""
        return hashlib.sha256(self.inputs.encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether it has been done with these inputs."""
        stamp = STAMPS / self.name
        return stamp.exists() and stamp.read_text() == self.digest


def check_machine() -> None:
    """Raises SetupError where this machine lacks something that pip cannot bring."""
    if sys.version_info[:2] != (3, 11):
        raise SetupError(f"This is Python {platform.python_version()}; run set-up with Python 3.11.")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"The locked set is for Linux on x86-64, this is {platform.system()} on {platform.machine()}. "
            "Elsewhere, install by hand: pip install -e '.[cpu,trainer]' --group dev."
        )
    packages = []
    if shutil.which("g++") is None:
        packages.append("g++")  # DeepSpeed compiles its shared-memory collective at first use
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        packages.append("python3.11-dev")
    if packages:
        raise SetupError(
            f"Missing on this machine: {', '.join(packages)}. Type: sudo apt-get install {' '.join(packages)}"
        )
    free = shutil.disk_usage(ROOT).free / 2**30
    if not STAMPS.exists() and free < SPACE_NEEDED_GIB:
        raise SetupError(f"{ROOT} has {free:.1f} GiB free; set-up needs {SPACE_NEEDED_GIB}. Make room and try again.")


def create_venv() -> None:
    """Makes `.venv`, anew where an earlier attempt was cut short."""
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0:
        return
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if made.returncode != 0:
        raise SetupError(
            f"python -m venv failed: {(made.stdout + made.stderr).strip()}\n"
            "On Debian and Ubuntu, type: sudo apt-get install python3.11-venv"
        )


def pip(*arguments: str | Path, expected: int = 0, python: Path = PYTHON) -> None:
    """Runs `pip install`, says how far it is, and keeps all it prints in the log.

    `expected` is how many packages it will name, for the progress shown. Raises SetupError with what went wrong.
    """
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", *arguments]
    fetched, last_told, lines = 0, time.monotonic(), list[str]()
    with (
        LOG.open("a") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        print("$", *command, file=log, flush=True)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            fetched += line.startswith(("Collecting ", "Processing ", "Requirement already satisfied: "))
            if line.startswith("Installing collected packages"):
                say("unpacking")
            elif 0 < fetched < expected and time.monotonic() - last_told > TOLD_EVERY_SECONDS:
                last_told = time.monotonic()
                say(f"{fetched} of {expected} fetched")
    if process.returncode != 0:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-10:]
        raise SetupError("\n".join([*errors, f"All that pip said is in {LOG}."]))


def install_torch() -> None:
    """CPU PyTorch, by pip's own settings (find-links and the like), else from PyTorch's CPU wheel index."""
    try:
        pip("-r", LOCKS / "torch.lock")
    except SetupError:
        say("not where pip looks by itself; taking it from PyTorch's CPU wheel index")
        pip("-r", LOCKS / "torch.lock", "--index-url", TORCH_INDEX)


def install_wheels() -> None:
    """Everything that comes as a wheel."""
    lock = LOCKS / "cpu.lock"
    count = sum(not line.startswith("#") for line in lock.read_text().splitlines())
    pip("--require-hashes", "--only-binary", ":all:", "-r", lock, expected=count)


def install_sources() -> None:
    """What has no wheel, built with the locked tools instead of whatever is newest."""
    pip("--require-hashes", "--no-build-isolation", "-r", LOCKS / "source.lock")


def install_tools() -> None:
    """What does not fit beside the rest, in an environment of its own."""
    if not (TOOLS / "bin" / "python").exists():
        subprocess.run([PYTHON, "-m", "venv", TOOLS], check=True, capture_output=True)
    pip("--require-hashes", "-r", LOCKS / "tools.lock", python=TOOLS / "bin" / "python")


def install_project() -> None:
    """Thumbwheel itself, as a path entry."""
    pip("--no-build-isolation", "--editable", ROOT)


def steps() -> Sequence[Step]:
    """What there is to do, in order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shape = [project["project"], project["build-system"], project["tool"]["hatch"]]
    return (
        Step("PyTorch", (LOCKS / "torch.lock").read_text(), install_torch),
        Step("wheels", (LOCKS / "cpu.lock").read_text(), install_wheels),
        Step("sources", (LOCKS / "source.lock").read_text(), install_sources),
        Step("project", json.dumps(shape, sort_keys=True), install_project),
    )


def say(text: str) -> None:
    """Tells the person waiting; standard output stays free for what `make` was asked to print."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Two `make` at once take turns. The lock goes with the process, whatever ends it."""
    folder = os.open(LOCKS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def set_up(*, tools: bool = False) -> None:
    """Does what has not been done yet, with the tools where they are asked for. Raises SetupError."""
    wanted = [*steps(), *([Step("tools", (LOCKS / "tools.lock").read_text(), install_tools)] if tools else [])]
    todo = [step for step in wanted if not step.done]
    if not todo:
        return
    started = time.monotonic()
    check_machine()
    create_venv()
    STAMPS.mkdir(exist_ok=True)
    for step in todo:
        say(step.name)
        step.run()
        (STAMPS / step.name).write_text(step.digest)
    say(f"ready in {time.monotonic() - started:.0f} s")


def main() -> None:
    """Sets up, or says why not."""
    os.environ.pop("PYTHONPATH", None)
    try:
        with turn():
            set_up(tools="--tools" in sys.argv[1:])
    except SetupError as error:
        sys.exit(f"setup: {error}")


if __name__ == "__main__":
    main()
