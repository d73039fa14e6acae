"""What was learnt is known for ever, and writing it down takes no longer as it grows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel import files
from trainer.learnt import FOLDER, OLDER, Learnt


def ids(begin: int, count: int) -> list[str]:
    return [f"id-{number:06d}" for number in range(begin, begin + count)]


@given(rounds=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["go on", "restart", "go back"])), max_size=25))
def test_it_is_a_set_through_restarts_and_back_to_the_checkpoint_before(
    rounds: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("learnt")
    home, learnt = root / ".learnt", Learnt(root / ".learnt")
    known: list[str] = []
    checkpoints: list[tuple[Path, list[str]]] = []
    for number, (count, what) in enumerate(rounds):
        new = ids(1000 * number, count)
        known = known + new
        learnt.update([*new, *known[:2]])
        folder = root / f"checkpoint-{number}"
        folder.mkdir()
        learnt.save(folder)
        checkpoints.append((folder, known))
        if len(checkpoints) > 2:
            shutil.rmtree(checkpoints.pop(0)[0])
        if what == "go back" and len(checkpoints) == 2:  # the newest is damaged
            shutil.rmtree(checkpoints.pop()[0])
            known = checkpoints[-1][1]
        if what != "go on":
            learnt = Learnt.load(checkpoints[-1][0], home)
        assert len(learnt) == len(known)
        assert all(each in learnt for each in known)
        assert "id-999999" not in learnt
    for folder, wanted in checkpoints:  # whole without its home, as a copy would be
        copied = Learnt.load(folder, root / "elsewhere")
        assert [each for each in wanted if each not in copied] == []
        assert len(copied) == len(wanted)


def test_what_is_written_does_not_grow_with_what_is_there(tmp_path: Path) -> None:
    learnt, written, rounds, size = Learnt(tmp_path / ".learnt"), 0, 256, 16
    for number in range(rounds):
        learnt.update(ids(size * number, size))
        before = {path.stat().st_ino for path in (tmp_path / ".learnt").glob("*.txt")}
        folder = tmp_path / str(number)
        folder.mkdir()
        learnt.save(folder)
        files = list((folder / FOLDER).iterdir())
        written += sum(len(path.read_text().split()) for path in files if path.stat().st_ino not in before)
        assert len(files) <= math.log2(number + 1) + 1
    assert len(learnt) == rounds * size
    assert written <= rounds * size * (math.log2(rounds) / 2 + 1), "each id once in a doubling; not once a round"


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = Learnt(tmp_path / ".learnt")
    for number in range(3):
        learnt.update(ids(10 * number, 10))
        (tmp_path / str(number)).mkdir()
        if number == 1:
            with monkeypatch.context() as full:
                full.setattr(files, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
                with pytest.raises(OSError, match="No space"):
                    learnt.save(tmp_path / "1")
            continue
        learnt.save(tmp_path / str(number))
    for number, count in ((0, 10), (2, 30)):
        found = Learnt.load(tmp_path / str(number), tmp_path / f"copy-{number}")
        assert len(found) == count
        assert all(each in found for each in ids(0, count))


def test_what_an_older_release_wrote_is_read_and_written_anew(tmp_path: Path) -> None:
    (tmp_path / OLDER).write_text("".join(f"{each}\n" for each in ids(0, 5)))
    learnt = Learnt.load(tmp_path, tmp_path / ".learnt")
    learnt.update(ids(3, 4))
    (tmp_path / "new").mkdir()
    learnt.save(tmp_path / "new")
    assert [path.read_text().split() for path in (tmp_path / "new" / FOLDER).iterdir()] == [ids(0, 7)]


def test_a_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    learnt = Learnt(tmp_path / ".learnt")
    for number, count in enumerate((8, 2)):
        learnt.update(ids(10 * number, count))
        (tmp_path / str(number)).mkdir()
        learnt.save(tmp_path / str(number))
    (tmp_path / "1" / FOLDER / "000000000000-8.txt").unlink()
    with pytest.raises(ValueError, match="does not have the 2 ids after the first 8"):
        Learnt.load(tmp_path / "1", tmp_path / "copy")
