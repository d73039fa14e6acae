"""The repository keeps its own promises: what is locked, documented, imported and packaged."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED_EXTRAS = ("cpu", "trainer", "web")
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
HEAVY = {"torch", "vllm", "deepspeed", "transformers"}


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, new ones included, ignored ones not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).exists())


def direct_requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for on a CPU machine."""
    project = PROJECT["project"]
    texts = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(text for extra in LOCKED_EXTRAS for text in project["optional-dependencies"][extra]),
        *PROJECT["dependency-groups"]["dev"],
    ]
    return [Requirement(text) for text in texts]


def pins(lock: str) -> dict[str, str]:
    """Name to version in a lock."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    return dict(line.split()[0].split("==") for line in lines if line and not line.startswith("#"))


def all_pins() -> dict[str, str]:
    """Name to version over all locks."""
    return pins("torch.lock") | pins("cpu.lock") | pins("source.lock")


def needed() -> set[str]:
    """Names of the direct requirements and of all that they need in turn, as the installed packages say."""
    seen: set[tuple[str, str]] = set()
    queue = direct_requirements()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in metadata.requires(name) or ():
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    queue.append(further)
    return {name for name, _ in seen}


def test_direct_requirements_are_locked_within_their_range() -> None:
    locked = all_pins()
    for requirement in direct_requirements():
        version = locked.get(canonicalize_name(requirement.name), "not locked")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version}: make lock"


def test_lock_is_whole_and_has_nothing_to_spare() -> None:
    assert set(all_pins()) == needed(), "make lock"


@pytest.mark.parametrize("lock", ["cpu.lock", "source.lock", "tools.lock"])
def test_every_pin_has_a_hash(lock: str) -> None:
    lines = [line for line in (ROOT / "requirements" / lock).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line)] == []


def test_every_direct_requirement_has_a_reason() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    explained = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    project = PROJECT["project"]
    gpu = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    assert explained == {canonicalize_name(requirement.name) for requirement in [*direct_requirements(), *gpu]}


def test_no_registry_is_named() -> None:
    hosts = ["pypi" + ".org", "python" + "hosted.org"]
    torch_host = "download.py" + "torch.org"
    naming_torch = []
    for path in tracked():
        content = (ROOT / path).read_bytes()
        assert not [host for host in hosts if host.encode() in content], path
        if torch_host.encode() in content:
            naming_torch.append(str(path))
    assert naming_torch == ["requirements/install.py"]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def test_shared_library_is_light() -> None:
    files = tracked("thumbwheel/*.py")
    assert Path("thumbwheel/client.py") in files
    assert [f"{path}:{line} imports {name}" for path in files for line, name in imported(path) if name in HEAVY] == []


def test_every_import_is_declared() -> None:
    project = PROJECT["project"]
    optional = {extra: texts for extra, texts in project["optional-dependencies"].items() if extra != "gpu"}
    everywhere, everything = project["dependencies"], direct_requirements()
    allowed = {
        "thumbwheel": [Requirement(text) for text in everywhere],
        "services": [Requirement(text) for text in (*everywhere, *optional["cpu"], *optional["web"])],
        "trainer": [Requirement(text) for text in (*everywhere, *optional["trainer"])],
        "tests": everything,
        "k8s": everything,
    }
    providers = metadata.packages_distributions()
    ours = {*allowed, "bench", "install", "k8s", *sys.stdlib_module_names}
    undeclared = [
        f"{path}:{line} imports {name}"
        for package, requirements in allowed.items()
        for path in tracked(f"{package}/*.py")
        for line, name in imported(path)
        if name not in ours
        and not {canonicalize_name(one) for one in providers.get(name, ())}
        & {canonicalize_name(requirement.name) for requirement in requirements}
    ]
    assert undeclared == []


def test_nothing_is_unpickled() -> None:
    files = tracked("thumbwheel/*.py", "services/*.py", "trainer/*.py")
    unsafe = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert [f"{path}:{line} imports {name}" for path in files for line, name in imported(path) if name in unsafe] == []


def readme_tree() -> list[Path]:
    """Paths in the README's annotated tree: two spaces a level, the name first, a folder's with a slash."""
    block = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    paths: list[Path] = []
    parents: list[str] = []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        paths.append(Path(*parents))
    return paths


def test_readme_tree_lists_what_there_is() -> None:
    listed = readme_tree()
    assert [str(path) for path in listed if not (ROOT / path).exists()] == [], "listed, but not there"
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    ours = [
        path for path in tracked(*packages, "requirements", "proto") if path.name not in ("__init__.py", "py.typed")
    ]
    leaves = {path for path in listed if (ROOT / path).is_dir() and not any(path in other.parents for other in listed)}
    hidden = [path for path in ours if path not in listed and not leaves & set(path.parents)]
    assert [str(path) for path in hidden] == [], "there, but not listed in README.md"


def test_each_threat_has_a_guard_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| (?!threat|---)([^|]+) \| ([^|]+) \| ((?:`test_\w+`(?:, )?)+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == text.partition("## Threat model")[2].partition("Not guarded")[0].count("\n|") - 2
    defined = {
        node.name
        for path in tracked("tests/**/test_*.py")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = {name for *_, tests in rows for name in re.findall(r"`(test_\w+)`", tests)}
    assert len(named) > 30
    assert named - defined == set(), "docs/security.md names tests that there are not"


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in tracked("*.md", "docs/*.md"):
        for target in re.findall(r"`make ([a-z0-9-]+)", (ROOT / document).read_text()):
            bench = ROOT / "bench" / f"{target.removeprefix('bench-').replace('-', '_')}.py"
            assert target in targets or target == "bench-" or bench.exists(), f"{document}: make {target}"


def test_configuration_is_documented_as_it_is() -> None:
    command = [sys.executable, str(ROOT / "docs" / "configuration.py")]
    written = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert (ROOT / "docs" / "configuration.md").read_text() == written, "make docs"


def test_wheel_holds_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {str(path) for path in tracked(*packages)} - inside == set()
    assert {f"{package}/py.typed" for package in packages} - inside == set()
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
