"""`make faults`: everything is broken on purpose; what came of it is one line of JSON.

    alerted   every fault of the collector, its broker, its database, disk, clock and memory, each told by its alert
    parts     every part of a whole wheel killed, its network, and versions damaged on the disk
    kills     the collector, its broker and its database killed at random moments of load
    swaps     versions that are not what they say, swapped under load

The form of ten minutes is the default; `--long` goes on for hours: more seeds, 200 kills, 1,000 swaps. Each is a
command of its own, which is printed, and can be repeated alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from tests.faults.disk import IN_A_NAMESPACE

_LONGEST_SECONDS = 6 * 3600.0


def commands(seeds: Sequence[int], *, long: bool) -> list[list[str]]:
    """What is run, one after the other."""
    found = []
    for seed in seeds:
        python = [sys.executable, "-m"]
        found.append([*IN_A_NAMESPACE, *python, "tests.faults.alerted", "--database", "sqlite", "--seed", str(seed)])
        found.append([*python, "tests.faults.alerted", "--database", "postgres", "--seed", str(seed)])
        found.append([*python, "tests.faults.parts", "--kills", "5" if long else "1", "--seed", str(seed)])
        found.append([*python, "tests.faults.collector", "--kills", "200" if long else "10", "--seed", str(seed)])
    if long:
        found.append([sys.executable, "-m", "tests.faults.swaps"])
    return found


def told(command: Sequence[str]) -> tuple[str, int]:
    """Runs it. Returns what it printed, which is printed as it comes, and its status."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        late = threading.Timer(_LONGEST_SECONDS, process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        late.cancel()
    return "".join(lines), process.returncode


def closing(output: str) -> dict[str, Any]:
    """The last line, where it is an object; else an empty one."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def total(lines: Sequence[dict[str, Any]], failed: Sequence[str], seconds: float) -> dict[str, Any]:
    """The closing line of all."""

    def add(name: str) -> int:
        return sum(int(line.get(name, 0)) for line in lines)

    def most(name: str) -> float:
        return max((float(line.get(name, 0.0)) for line in lines), default=0.0)

    return {
        "faults": "all",
        "injected": add("injected") + add("kills"),
        "acknowledged": add("acknowledged"),
        "lost": add("lost"),
        "doubled": add("doubled"),
        "reordered": add("reordered"),
        "wrong": add("wrong"),
        "unverified": add("unverified"),
        "most_evaluations": most("most_evaluations"),
        "most_recovery_seconds": most("most_recovery_seconds"),
        "retries": most("retries"),
        "failed": list(failed),
        "seconds": round(seconds),
    }


def main() -> int:
    """Runs all; status 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="hours instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began, lines, failed = time.monotonic(), [], []
    seeds = range(given.seed, given.seed + (10 if given.long else 1))
    for command in commands(seeds, long=given.long):
        said = " ".join(command[command.index("-m") :])
        print(f"{said} ...", flush=True)
        output, status = told(command)
        lines.append(closing(output))
        if status:
            failed.append(said)
    print(json.dumps(total(lines, failed, time.monotonic() - began)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
