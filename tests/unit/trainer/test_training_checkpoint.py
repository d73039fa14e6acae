"""A training checkpoint is there whole or not at all."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from thumbwheel import errors, files
from trainer.checkpoint import TrainingCheckpoints


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.pt").write_text(text * 1000)
        (folder / "state.json").write_text(text)

    return fill


def content(folder: Path | None) -> str:
    assert folder is not None
    return (folder / "state.json").read_text()


@pytest.fixture
def checkpoints(tmp_path: Path) -> TrainingCheckpoints:
    found = TrainingCheckpoints(tmp_path / "policy", keep=2)
    assert found.newest() is None
    for number, text in enumerate(("one", "two", "three"), 1):
        found.write(number, fill_with(text))
    return found


def test_the_newest_counts_and_two_are_kept(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    assert content(checkpoints.newest()) == "three"
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["checkpoint-000002", "checkpoint-000003"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "deep" / "weights.pt").write_text("three"), "weights.pt has 5 bytes instead of 5,000"),
        (lambda f: (f / "deep" / "weights.pt").write_text("eerht" * 1000), "weights.pt was altered"),
        (lambda f: (f / "deep" / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda f: (f / "index.json").unlink(), "index.json is missing"),
        (lambda f: (f / "index.json").write_text("{"), "index.json cannot be read"),
        (lambda f: (f / "index.json").write_text('{"format": 9}'), "has format 9"),
        (lambda f: (f / "index.json").write_text('{"format": 1, "files": 3}'), "index.json cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_message(
    damage: Callable[[Path], None],
    message: str,
    checkpoints: TrainingCheckpoints,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(tmp_path / "policy" / "checkpoint-000003")
    with caplog.at_level(logging.ERROR):
        assert content(checkpoints.newest()) == "two"
    assert message in caplog.text
    checkpoints.write(3, fill_with("three again"))
    assert content(checkpoints.newest()) == "three again"


def test_where_none_is_whole_nothing_begins_anew(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    for folder in (tmp_path / "policy").iterdir():
        (folder / "state.json").write_text("")
    with pytest.raises(errors.CorruptCheckpoint, match=r"state.json has 0 bytes .*Restore one from a copy"):
        checkpoints.newest()


def test_dying_while_writing_leaves_the_one_before(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(folder: Path) -> None:
        fill_with("four")(folder)
        raise Killed

    with pytest.raises(Killed):
        checkpoints.write(4, die)
    # What a kill -9 would have left is no checkpoint either, and goes with the next write.
    fill_with("leftover")(_made(tmp_path / "policy" / ".staging"))
    assert content(checkpoints.newest()) == "three"
    checkpoints.write(4, fill_with("four"))
    assert content(checkpoints.newest()) == "four"
    assert not (tmp_path / "policy" / ".staging").exists()


def test_it_is_renamed_only_once_all_is_on_the_disk(
    checkpoints: TrainingCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = files.sync

    def sync(path: Path) -> None:
        synced.append(path.relative_to(tmp_path / "policy").as_posix())
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    checkpoints.write(4, fill_with("four"))
    assert set(synced[:-1]) == {
        ".staging/deep/weights.pt",
        ".staging/state.json",
        ".staging/index.json",
        ".staging/deep",
        ".staging",
    }
    assert synced[-2:] == [".staging", "."]


def test_a_full_disk_is_named_and_keeps_what_there_is(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        fill_with("four")(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(errors.NoSpace, match="checkpoint-000004"):
        checkpoints.write(4, full)
    assert content(checkpoints.newest()) == "three"
    assert not (tmp_path / "policy" / ".staging").exists()


def test_what_a_round_learns_is_written_down_and_goes_when_no_checkpoint_needs_it(
    checkpoints: TrainingCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints 2 and 3 are kept; from 2 on, rounds 3 and 4 may have to be learnt again."""
    for number in (3, 4):
        checkpoints.write_round(number, fill_with(f"round {number}"))
    assert content(checkpoints.round(4)) == "round 4"
    assert checkpoints.round(5) is None
    assert content(checkpoints.newest()) == "three"
    checkpoints.write(4, fill_with("four"))
    names = sorted(path.name for path in (tmp_path / "policy").iterdir())
    assert names == ["checkpoint-000003", "checkpoint-000004", "round-000004"]
    (tmp_path / "policy" / "round-000004" / "state.json").write_text("")
    with caplog.at_level(logging.ERROR):
        assert checkpoints.round(4) is None
    assert "what a round learns is read from the stream again" in caplog.text


def test_a_checkpoint_is_none_before_its_second_half_is_done(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    staging = checkpoints.stage(4, fill_with("four"))
    assert content(checkpoints.newest()) == "three"

    def more() -> None:
        (staging / "late.bin").write_text("late")
        assert content(checkpoints.newest()) == "three"

    assert checkpoints.finish(4, staging, more) == checkpoints.target(4)
    assert content(checkpoints.newest()) == "four"
    assert (checkpoints.target(4) / "late.bin").read_text() == "late"

    def fail() -> None:
        raise errors.Internal("a rank is gone")

    with pytest.raises(errors.Internal, match="a rank is gone"):
        checkpoints.finish(5, checkpoints.stage(5, fill_with("five")), fail)
    assert content(checkpoints.newest()) == "four"
    assert not (tmp_path / "policy" / ".staging").exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_files_are_hashed_once_and_those_not_that_come_with_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, hashed = TrainingCheckpoints(tmp_path / "policy"), list[str]()
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))  # type: ignore[func-returns-value]
    (tmp_path / "shared").write_text("shared")

    def fill(folder: Path) -> None:
        (folder / "link").hardlink_to(tmp_path / "shared")
        (folder / "told").write_text("told")
        (folder / "told.sha256").write_text(files.sha256_bytes(b"told"))
        (folder / "fresh").write_text("fresh")

    for number in (1, 2):
        checkpoints.write(number, fill)
    assert hashed == ["fresh", "link", "told.sha256", "fresh", "told.sha256"]
    assert checkpoints.newest() == tmp_path / "policy" / "checkpoint-000002"

    def fill_otherwise(folder: Path) -> None:
        fill(folder)
        (folder / "told").write_text("tolb")  # what reached the disk is not what was hashed

    checkpoints.write(3, fill_otherwise)
    assert checkpoints.newest() == tmp_path / "policy" / "checkpoint-000002"
