"""`make fuzz`: bytes made up by atheris, guided by which code they reach, thrown at every decoder of outside bytes.

    python -m tests.fuzz.run --executions 10000000            # all of them, one after the other
    python -m tests.fuzz.run --target deltas --seconds 600

Each target is a process of its own. What breaks one is kept in `fuzz-out/TARGET/`: put the file beside the seeds in
`tests/fuzz/seeds/TARGET/` together with the fix, and it is tried in every run of the tests. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

SEEDS = Path(__file__).resolve().parent / "seeds"
MAX_BYTES = 4096


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["thumbwheel", "services", "trainer"]):
        from tests.fuzz import targets
    decode = targets.TARGETS[name](targets.folder())
    atheris.Setup([sys.argv[0], *arguments], lambda data: targets.attempt(decode, data) and None)
    atheris.Fuzz()


def run(name: str, *, executions: int, seconds: int, seed: int, out: Path) -> dict[str, object]:
    """Fuzzes a target in a process; how often it ran, how fast, how much code it reached, and whether it broke."""
    corpus = out / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    arguments = [f"-seed={seed}", f"-max_len={MAX_BYTES}", f"-artifact_prefix={out / name}/", "-print_final_stats=1"]
    arguments += [f"-runs={executions}", "-timeout=20", "-rss_limit_mb=4096"]
    arguments += [f"-max_total_time={seconds}"] if seconds else []
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.run",
        "--child",
        name,
        "--",
        *arguments,
        str(corpus),
        str(SEEDS / name),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    took = time.monotonic() - began
    said = done.stdout + done.stderr
    (out / name / "log").write_text(said)
    executed = re.findall(r"stat::number_of_executed_units:\s+(\d+)", said)
    rate = re.findall(r"stat::average_exec_per_sec:\s+(\d+)", said)
    covered = re.findall(r"cov: (\d+)", said)
    return {
        "executions": int(executed[-1]) if executed else 0,
        "per_second": int(rate[-1]) if rate else 0,
        "covered": int(covered[-1]) if covered else 0,
        "seconds": round(took, 1),
        "broken": done.returncode != 0,
    }


def main() -> int:
    """Fuzzes what is asked for. Returns 1 where anything broke."""
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        fuzz(sys.argv[at + 1], sys.argv[at + 3 :])
        return 0
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="this one; may be given again")
    parser.add_argument("--executions", type=int, default=10_000_000, help="of each target (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=0, help="longest time for each target; 0 is no limit")
    parser.add_argument("--seed", type=int, default=1, help="decides what is made up (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"), help="where findings and logs go")
    given = parser.parse_args()
    results = {}
    for name in given.target or TARGETS:
        results[name] = run(
            name, executions=given.executions, seconds=given.seconds, seed=given.seed, out=given.out.resolve()
        )
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    broken = sorted(name for name, result in results.items() if result["broken"])
    for name in broken:
        print(f"{name} broke: see {given.out / name}/log", file=sys.stderr)
    print(json.dumps({"fuzz": results, "broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
