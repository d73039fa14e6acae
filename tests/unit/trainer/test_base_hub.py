"""Fetching a base model from a hub: a server of our own that answers as the real one does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.trainer.models_on_disk import SILENT, fill
from thumbwheel import errors
from trainer import base
from trainer.base import hub


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as its client asks for."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.sent: list[str] = []
        self.break_off: str | None = None


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub = self.server
        file = path.removeprefix(f"/org/name/resolve/{hub.commit}/")
        if path == "/api/models/org/name/revision/main":
            self.answer(json.dumps({"id": "org/name", "sha": hub.commit, "siblings": []}).encode())
        elif path == f"/api/models/org/name/tree/{hub.commit}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif file in hub.files:
            if self.command == "GET":
                hub.sent.append(file)
            self.answer(
                hub.files[file], ETag=f'"{hashlib.sha1(hub.files[file]).hexdigest()}"', cut=file == hub.break_off
            )
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, body: bytes, *, cut: bool = False, **headers: str) -> None:
        self.send_response(200)
        for name, value in {**headers, "X-Repo-Commit": Hub.commit, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    fill(tmp_path / "original")
    files = {p.name: p.read_bytes() for p in (tmp_path / "original").iterdir()}
    hub = Hub({**files, "pytorch_model.bin": b"pickle", "modeling.py": b"import os", "onnx/config.json": b"{}"})
    use(monkeypatch, f"http://127.0.0.1:{hub.server_port}", tmp_path)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join(10)
    hub.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_a_model_of_the_hub_without_pickles_and_code(served: Hub, tmp_path: Path) -> None:
    folder = base.fetch("org/name", tmp_path / "cache")
    assert folder == tmp_path / "cache/org--name@main/name"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "original").iterdir()
    }
    sent = len(served.sent)
    assert base.fetch("org/name@main", tmp_path / "cache") == folder
    assert len(served.sent) == sent


def test_an_interrupted_download_goes_on_where_it_was(served: Hub, tmp_path: Path) -> None:
    served.files["tokenizer.json"] = b"{" + b" " * 100_000 + b"}"
    served.break_off = "tokenizer.json"
    with pytest.raises(errors.Unavailable, match="org/name") as caught:
        base.fetch("org/name", tmp_path / "cache")
    assert "what is done is kept" in caught.value.remedy
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["partial"]
    served.break_off = None
    served.sent.clear()
    folder = base.fetch("org/name", tmp_path / "cache")
    assert (folder / "tokenizer.json").stat().st_size == 100_002
    assert served.sent == ["tokenizer.json"]


def test_a_model_that_the_hub_does_not_have(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(errors.MissingModel, match="The hub has no model org/other at main") as caught:
        base.fetch("org/other", tmp_path / "cache")
    assert "hf auth login" in caught.value.remedy


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(errors.Unavailable, match=r"The hub could not be reached for org/name: .*refused") as caught:
        hub.fetch("org/name", "main", tmp_path / "cache", SILENT)
    assert "thumbwheel model fetch PATH" in caught.value.remedy


def test_too_little_space_for_a_model_of_the_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1, "total": 1, "used": 0}))
    with pytest.raises(errors.NoSpace, match="for org/name: at least"):
        base.fetch("org/name", tmp_path / "cache")
    assert served.sent == []
