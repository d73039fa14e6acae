"""Set-up: it goes on where it stopped, does only what changed, and says what a machine lacks."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "requirements"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """requirements/install.py, with an empty `.venv` elsewhere and a machine that has everything."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("install")
    venv = tmp_path / ".venv"
    venv.mkdir()
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "STAMPS", venv / ".setup")
    monkeypatch.setattr(module, "LOG", venv / "setup.log")
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    return module


def test_goes_on_where_it_stopped(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    broken = True

    def second() -> None:
        ran.append("second")
        if broken:
            raise install.SetupError("the network is away")

    def steps() -> list[object]:
        return [
            install.Step("first", "a", lambda: ran.append("first")),
            install.Step("second", "b", second),
            install.Step("third", "c", lambda: ran.append("third")),
        ]

    monkeypatch.setattr(install, "steps", steps)
    monkeypatch.setattr(install, "check_machine", lambda: None)
    with pytest.raises(SystemExit, match="the network is away"):
        install.main()
    broken = False
    install.main()
    assert ran == ["first", "second", "second", "third"]
    install.main()
    assert ran == ["first", "second", "second", "third"]


def test_step_is_done_again_when_its_lock_changes(install: ModuleType) -> None:
    install.STAMPS.mkdir()
    before, after = (install.Step("wheels", text, lambda: None) for text in ("rich==15.0.0", "rich==15.0.1"))
    assert not before.done
    (install.STAMPS / "wheels").write_text(before.digest)
    assert before.done
    assert not after.done


def test_torch_comes_from_its_own_index_where_pip_does_not_know_it(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def pip(*arguments: object) -> None:
        asked.append(arguments)
        if "--index-url" not in arguments:
            raise install.SetupError("ERROR: No matching distribution found for torch==2.13.0+cpu")

    monkeypatch.setattr(install, "pip", pip)
    install.install_torch()
    lock = ("-r", install.LOCKS / "torch.lock")
    assert asked == [lock, (*lock, "--index-url", install.TORCH_INDEX)]


def test_torch_is_left_where_pip_finds_it(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(install, "pip", lambda *arguments: asked.append(arguments))
    install.install_torch()
    assert asked == [("-r", install.LOCKS / "torch.lock")]


def test_pip_failure_is_told_with_its_errors_and_the_log(install: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(install.SetupError, match=r"ERROR: .*nowhere\.txt[\s\S]*setup\.log"):
        install.pip("-r", tmp_path / "nowhere.txt")
    assert "nowhere.txt" in install.LOG.read_text()


def test_missing_compiler_is_named_with_the_remedy(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(install.SetupError, match=r"apt-get install g\+\+"):
        install.check_machine()


def test_full_disk_is_told_before_anything_is_installed(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(install.SetupError, match=r"1\.0 GiB free; set-up needs 5"):
        install.check_machine()


def test_wrong_machine_is_told(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    with pytest.raises(install.SetupError, match=r"Linux on aarch64.*pip install"):
        install.check_machine()
