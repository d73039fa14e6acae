"""The scan of all logs at the end of the tests notices each kind of secret, and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from services.collector.database import Database
from tests import secrets
from thumbwheel import apikeys, auth, errors, telemetry


def test_each_kind_of_secret_is_noticed(tmp_path: Path) -> None:
    auth.create_keys(tmp_path / "keys")
    _, key = apikeys.create(tmp_path / "keys", scopes=["admin"])
    kept = list(secrets.kept(tmp_path))
    assert len(kept) == 2
    for text, what in (
        (f"called with {key}", "an API key"),
        ((tmp_path / "keys" / "manifest.key").read_text(), "a private key"),
        ("postgresql+psycopg://app:hunter2@db/thumbwheel", "a password in a URL"),
        (f"authorization: Bearer {'x' * 20}", "a bearer token"),
        (f"the key is {(tmp_path / 'keys' / 'receipt.key').read_text()}", "a key of the deployment"),
        (kept[1], "a key of the deployment"),
    ):
        assert what in secrets.leaks(text, kept), text
    for text in ("Send it as `authorization: Bearer tw_...`", "postgresql+psycopg://db/thumbwheel", "127.0.0.1:50051"):
        assert secrets.leaks(text, kept) == []


def test_keys_do_not_show_themselves(tmp_path: Path) -> None:
    auth.create_keys(tmp_path)
    _, key = apikeys.create(tmp_path, scopes=["admin"])
    ring, receipt, signer = (
        apikeys.KeyRing(tmp_path),
        auth.ReceiptKey.load(tmp_path),
        auth.ManifestSigner.load(tmp_path),
    )
    with pytest.raises(errors.Unauthenticated) as refused:
        ring.check(key[:-1] + ("A" if key[-1] != "A" else "B"), "admin")
    shown = f"{ring!r} {receipt!r} {signer!r} {refused.value!r} {refused.value}"
    assert secrets.leaks(shown, secrets.kept(tmp_path)) == []


def test_a_database_that_cannot_be_reached_does_not_tell_its_password(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(errors.ThumbwheelError) as refused:
        Database("postgresql+psycopg://app:hunter2@127.0.0.1:1/thumbwheel?connect_timeout=1")
    record = logging.makeLogRecord({"msg": str(refused.value), "levelname": "ERROR", "levelno": logging.ERROR})
    line = json.loads(telemetry.JsonFormatter("collector").format(record))
    assert "hunter2" not in line["message"]
    assert "hunter2" not in caplog.text
