"""`make check-k8s`: what each overlay makes is rendered, and checked against schemas, checkov and our own rules."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from k8s import rules, schemas

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OVERLAYS = ("dev", "gpu")
KUBECTL = Path(sys.executable).parent / "kubectl"
CHECKOV = ROOT / ".venv" / "tools" / "bin" / "checkov"
SECONDS = 300


def render(overlay: str) -> str:
    """What `kubectl apply -k` would send. Raises `RuntimeError` with what kubectl said."""
    command = [str(KUBECTL), "kustomize", str(HERE / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{overlay}: {done.stderr.strip()}")
    return done.stdout


def load(overlay: str) -> list[dict[str, Any]]:
    """The resources of an overlay."""
    return [one for one in yaml.safe_load_all(render(overlay)) if one]


def checkov(overlay: str) -> tuple[int, list[str]]:
    """How many of checkov's checks passed, and those that did not."""
    if not CHECKOV.exists():
        raise RuntimeError(f"{CHECKOV} is not there; type: make tools")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{overlay}.yaml")
        path.write_text(render(overlay))
        command = [str(CHECKOV), "--file", str(path), "--config-file", str(HERE / "checkov.yaml"), "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    try:
        report = json.loads(done.stdout)
    except ValueError as error:
        raise RuntimeError(f"checkov said no JSON: {done.stdout[-500:]}{done.stderr[-500:]}") from error
    failed = [f"{one['check_id']} {one['resource']}: {one['check_name']}" for one in report["results"]["failed_checks"]]
    return int(report["summary"]["passed"]), failed


def faults(resources: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong by schemas and by our own rules."""
    for resource in resources:
        yield from schemas.faults(resource)
    cluster = rules.Cluster(resources)
    for rule in rules.RULES:
        yield from rule(cluster)


def main() -> int:
    """Prints what is wrong, and a JSON line. Returns 1 where anything is."""
    said: dict[str, Any] = {"check": "k8s", "rules": len(rules.RULES)}
    wrong = 0
    for overlay in OVERLAYS:
        try:
            resources = load(overlay)
            found = list(faults(resources))
            passed, failed = checkov(overlay)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        for fault in found + failed:
            print(f"{overlay}: {fault}", file=sys.stderr)
        wrong += len(found) + len(failed)
        said[overlay] = {"resources": len(resources), "checkov_passed": passed, "faults": len(found) + len(failed)}
    print(json.dumps(said | {"faults": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
