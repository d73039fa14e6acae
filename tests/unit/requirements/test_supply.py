"""The supply chain: bill of materials, licences, and a database of weaknesses that is a file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def supply(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "requirements")
    return importlib.import_module("supply")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "requirements" / "supply.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_bill_names_all_that_is_locked_with_its_hash(supply: ModuleType) -> None:
    bill = json.loads(supply.sbom())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    listed = {one["name"]: one for one in bill["components"]}
    locked = {one.name: one for one in supply.packages()}
    assert listed.keys() == locked.keys()
    assert len(locked) > 200
    grpcio = listed["grpcio"]
    assert grpcio["purl"] == f"pkg:pypi/grpcio@{locked['grpcio'].version}"
    assert grpcio["hashes"] == [{"alg": "SHA-256", "content": locked["grpcio"].sha256}]
    [ours] = [one for one in bill["dependencies"] if one["ref"] == "thumbwheel"]
    assert len(ours["dependsOn"]) == len(locked)


def test_every_licence_is_allowed_or_was_looked_at(supply: ModuleType) -> None:
    done = run("licences")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rich " in done.stdout
    for text in ("GPL-3.0", "AGPL-3.0-only", "Other/Proprietary License", ""):
        assert not supply.ALLOWED.search(text), text
    assert set(supply.REVIEWED) <= {one.name for one in supply.packages()}


def record(name: str = "grpcio", **affected: Any) -> dict[str, Any]:
    return {"id": "X-1", "summary": "bad", "affected": [{"package": {"ecosystem": "PyPI", "name": name}, **affected}]}


def span(*events: dict[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


@pytest.mark.parametrize(
    ("affected", "hit"),
    [
        (span({"introduced": "0"}), True),
        (span({"introduced": "0"}, {"fixed": "1.5"}), False),
        (span({"introduced": "0"}, {"fixed": "1.6"}), True),
        (span({"introduced": "1.5"}), True),
        (span({"introduced": "1.5.1"}), False),
        (span({"introduced": "0"}, {"last_affected": "1.5"}), True),
        (span({"introduced": "0"}, {"last_affected": "1.4"}), False),
        (span({"introduced": "0"}, {"fixed": "1.2"}, {"introduced": "1.4"}, {"fixed": "1.6"}), True),
        ({"versions": ["1.4", "1.5"]}, True),
        ({"versions": ["1.4"]}, False),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, False),
    ],
)
def test_ranges_of_versions(supply: ModuleType, affected: dict[str, Any], hit: bool) -> None:
    assert supply.affects(record(**affected), supply.Package("grpcio", "1.5+cpu", "")) is hit
    assert not supply.affects(record("grpcio-tools", **affected), supply.Package("grpcio", "1.5", ""))
    assert not supply.affects(record(**affected) | {"withdrawn": "2026-01-01"}, supply.Package("grpcio", "1.5", ""))


@pytest.mark.parametrize("lines", [True, False])
def test_a_database_of_a_file_is_looked_up(tmp_path: Path, lines: bool) -> None:
    bad, good = (
        record("GRPCIO", **span({"introduced": "0"})),
        record("rich", **span({"introduced": "0"}, {"fixed": "1"})),
    )
    path = tmp_path / "osv.json"
    path.write_text("\n".join(map(json.dumps, (bad, good))) if lines else json.dumps([bad, good]))
    done = run("vulnerabilities", str(path))
    assert done.returncode == 1
    assert "X-1 bad" in done.stderr
    assert json.loads(done.stdout)["found"] == 1
    path.write_text(json.dumps([good]))
    assert run("vulnerabilities", str(path)).returncode == 0
    path.write_text("no JSON")
    assert run("vulnerabilities", str(path)).returncode == 2
    assert run("vulnerabilities", str(tmp_path / "nowhere")).returncode == 2
