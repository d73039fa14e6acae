"""Writes the locks beside this file from pyproject.toml: `make lock`. Run with the project's own `.venv`.

Pins that still fit are kept; `make lock ARGS=--upgrade` takes the newest of everything. pip resolves, and its report
says which file it would install; nothing is installed here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from install import LOCKS, ROOT, TORCH_INDEX, SetupError, check_machine

EXTRAS = ("cpu", "trainer", "web")
LEFT_OUT: Mapping[str, str] = {
    "torch": "in torch.lock, since its file differs from source to source",
    "torchaudio": "CUDA builds that do not load beside CPU torch; the text path needs none",
    "torchcodec": "as torchaudio",
    "torchvision": "as torchaudio; when it fails to load it takes the engine down",
    "triton": "a compiler for GPUs",
}
HEADER = """\
# {title}
# Written by `make lock` (requirements/lock.py) from pyproject.toml; do not edit. For Linux on x86-64, Python 3.11.
# Left out, though something asks for them:
{left_out}
"""


@dataclass(frozen=True, order=True)
class Pin:
    """A file of a package."""

    name: str
    version: str
    sha256: str
    is_wheel: bool

    def __str__(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def normalised(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: Mapping[str, Any]) -> list[str]:
    """What pyproject.toml asks for on a CPU machine: to build, to run, to train, to test."""
    optional = project["project"]["optional-dependencies"]
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(requirement for extra in EXTRAS for requirement in optional[extra]),
        *project["dependency-groups"]["dev"],
    ]


def current_pins() -> list[str]:
    """The pins of the present locks, as constraints."""
    text = "".join(path.read_text() for path in sorted(LOCKS.glob("*.lock")) if path.name != "tools.lock")
    return re.findall(r"^([^#\s]\S+==\S+)", text, flags=re.MULTILINE)


def resolve(wanted: Sequence[str], constraints: Sequence[str], index: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What pip would install for `wanted` into an empty environment. Raises SetupError where nothing fits."""
    with tempfile.TemporaryDirectory() as folder:
        asked, held, report = Path(folder, "in.txt"), Path(folder, "constraints.txt"), Path(folder, "report.json")
        asked.write_text("\n".join(wanted))
        held.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-r", str(asked), "-c", str(held), *index]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SetupError("pip found no set that fits. With a newer version wanted, type: make lock ARGS=--upgrade")
        items: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return items


def pins(items: Iterable[Mapping[str, Any]]) -> list[Pin]:
    """The pins that an installation report amounts to, by name."""
    return sorted(
        Pin(
            name=normalised(item["metadata"]["name"]),
            version=item["metadata"]["version"],
            sha256=item["download_info"]["archive_info"]["hashes"]["sha256"],
            is_wheel=item["download_info"]["url"].endswith(".whl"),
        )
        for item in items
    )


def write(path: Path, title: str, chosen: Iterable[Pin]) -> None:
    """Writes a lock."""
    left_out = "\n".join(f"#   {name}: {reason}" for name, reason in LEFT_OUT.items())
    path.write_text(HEADER.format(title=title, left_out=left_out) + "".join(f"{pin}\n" for pin in chosen))


def write_tools(wanted: Sequence[str], *, upgrade: bool) -> None:
    """Writes tools.lock: programs whose own requirements do not fit beside ours, for an environment of their own."""
    path = LOCKS / "tools.lock"
    held = (
        [] if upgrade or not path.exists() else re.findall(r"^([^#\s]\S+==\S+)", path.read_text(), flags=re.MULTILINE)
    )
    write(path, "Tools with an environment of their own, .venv/tools: `make tools`.", pins(resolve(wanted, held)))


def main() -> None:
    """Resolves and writes the four locks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest of everything that fits")
    upgrade: bool = parser.parse_args().upgrade
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = requirements(project)
    held = [] if upgrade else current_pins()
    try:
        check_machine()
        write_tools(project["dependency-groups"]["tools"], upgrade=upgrade)
        try:
            found = pins(resolve(wanted, held))
        except SetupError:
            found = pins(resolve(wanted, held, index=("--extra-index-url", TORCH_INDEX)))
    except SetupError as error:
        sys.exit(f"lock: {error}")
    locked = [pin for pin in found if pin.name not in LEFT_OUT]
    write(
        LOCKS / "cpu.lock",
        "Every wheel of the CPU set, whole: installed with --no-deps.",
        [p for p in locked if p.is_wheel],
    )
    write(
        LOCKS / "source.lock",
        "What has no wheel: built with the tools of cpu.lock.",
        [p for p in locked if not p.is_wheel],
    )
    torch_lock = LOCKS / "torch.lock"
    torch = next(pin.version for pin in found if pin.name == "torch")
    torch_lock.write_text(re.sub(r"^torch==.*$", f"torch=={torch}", torch_lock.read_text(), flags=re.MULTILINE))
    print(f"{len(locked)} packages locked; torch is {torch}")


if __name__ == "__main__":
    main()
