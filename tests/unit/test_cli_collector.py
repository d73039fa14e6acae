"""`thumbwheel collector`, as an operator types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner, Result

from services.collector import tables
from services.collector.database import Database
from thumbwheel.cli import app

RUNNER = CliRunner()


def run(home: Path, *arguments: str) -> Result:
    return RUNNER.invoke(app, ["collector", *arguments, "--home", str(home)])


def test_aspects_trust_and_a_backup_that_comes_back(tmp_path: Path) -> None:
    (tmp_path / "wit.md").write_text("Does it make you smile?")
    home, other, file = tmp_path / "home", tmp_path / "other", tmp_path / "backup.gz"
    made = run(home, "aspects", f"wit={tmp_path / 'wit.md'}")
    assert made.stdout.startswith("guidelines 1-"), made.output
    assert made.stdout.endswith("helpfulness, harmlessness, fluency, wit\n")
    assert run(home, "trust", "ann", "quarantine").exit_code == 0
    [rater] = [json.loads(line) for line in run(home, "raters").stdout.splitlines()]
    assert (rater["user"], rater["by_hand"], rater["weight"]) == ("ann", "QUARANTINED", 1.0)
    assert run(home, "backup", str(file)).stdout == f"3 rows in {file}\n"
    assert run(other, "restore", str(file)).stdout == "3 rows restored\n"
    assert run(other, "raters").stdout == run(home, "raters").stdout
    again = run(other, "restore", str(file))
    assert again.exit_code == 1
    assert "not empty" in again.stderr


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_half_a_backup_is_refused_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    home, other, file = tmp_path / "home", tmp_path / "other", tmp_path / "backup.gz"
    (tmp_path / "wit.md").write_text("Does it make you smile?")
    run(home, "aspects", f"wit={tmp_path / 'wit.md'}")
    run(home, "backup", str(file))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"something else")
    refused = run(other, "restore", str(file))
    assert refused.exit_code == 1
    assert str(file) in refused.stderr
    database = Database(f"sqlite:///{other / 'collector.db'}")
    rows = database.read_now(lambda c: c.execute(select(func.count()).select_from(tables.guidelines)).scalar_one())
    database.close()
    assert rows == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "--from", "yesterday"], "--from: is 'yesterday'"),
        (["gold", "no"], "no comparison 'no' with a winner"),
        (["release", "no"], "no feedback 'no'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    refused = run(tmp_path, *arguments)
    assert refused.exit_code == 1
    assert message in refused.stderr
