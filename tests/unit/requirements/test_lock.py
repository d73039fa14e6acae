"""The lock: what pip's report amounts to, and what is left out."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "requirements"


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """requirements/lock.py, writing elsewhere."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("lock")
    monkeypatch.setattr(module, "LOCKS", tmp_path)
    return module


def reported(name: str, version: str, file: str) -> dict[str, Any]:
    """An item of pip's installation report."""
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {"url": f"https://example.org/{file}", "archive_info": {"hashes": {"sha256": "ab" * 32}}},
    }


def test_wheels_and_sources_are_told_apart(
    lock: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        reported("torch", "2.13.0+cpu", "torch.whl"),
        reported("torchvision", "0.28.0", "torchvision.whl"),
        reported("typing_extensions", "4.16.0", "typing_extensions.whl"),
        reported("deepspeed", "0.19.8", "deepspeed-0.19.8.tar.gz"),
        reported("Jinja2", "3.1.6", "jinja2.whl"),
    ]
    (tmp_path / "torch.lock").write_text("# why\ntorch==2.12.0+cpu\n")
    monkeypatch.setattr(lock, "resolve", lambda wanted, held, index=(): found)
    monkeypatch.setattr(lock, "check_machine", lambda: None)
    monkeypatch.setattr("sys.argv", ["lock.py"])
    lock.main()

    def pins(name: str) -> list[str]:
        return [line for line in (tmp_path / name).read_text().splitlines() if not line.startswith("#")]

    digest = "--hash=sha256:" + "ab" * 32
    assert pins("cpu.lock") == [f"jinja2==3.1.6 {digest}", f"typing-extensions==4.16.0 {digest}"]
    assert pins("source.lock") == [f"deepspeed==0.19.8 {digest}"]
    assert (tmp_path / "torch.lock").read_text() == "# why\ntorch==2.13.0+cpu\n"
    assert "3 packages locked; torch is 2.13.0+cpu" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "held"), [([], ["rich==15.0.0", "torch==2.13.0+cpu"]), (["--upgrade"], [])])
def test_pins_are_kept_unless_an_upgrade_is_asked_for(
    lock: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], held: list[str]
) -> None:
    (tmp_path / "cpu.lock").write_text("# head\nrich==15.0.0 --hash=sha256:00\n")
    (tmp_path / "torch.lock").write_text("torch==2.13.0+cpu\n")
    constraints: list[list[str]] = []

    def resolve(wanted: list[str], given: list[str], index: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        constraints.append(given)
        return [reported("torch", "2.13.0+cpu", "torch.whl")]

    monkeypatch.setattr(lock, "resolve", resolve)
    monkeypatch.setattr(lock, "check_machine", lambda: None)
    monkeypatch.setattr("sys.argv", ["lock.py", *arguments])
    lock.main()
    assert constraints == [[], held]  # the tools are resolved apart, and none is pinned yet
