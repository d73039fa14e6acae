"""The spool: in order, bounded, and still there after a restart."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.policy.spool import Entry, Spool
from thumbwheel import errors

SIZE = 1000 + 3 + 64  # bytes of each event below, as the spool counts them


def _entries(first: int, last: int) -> list[Entry]:
    return [Entry(f"e{number}", b"key", b"v" * 1000) for number in range(first, last + 1)]


def _ids(spool: Spool, limit: int = 100) -> list[str]:
    return [row.event_id for row in spool.read(limit)]


def test_events_come_out_in_order_until_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.db", limit=10**6)
    assert spool.append(_entries(1, 3)) == 0
    assert spool.append(_entries(4, 5)) == 0
    assert _ids(spool, 4) == ["e1", "e2", "e3", "e4"]
    spool.advance(spool.read(2)[-1].id)
    assert _ids(spool) == ["e3", "e4", "e5"]
    assert (spool.held, spool.waiting, spool.bytes) == (5, 3, 5 * SIZE)
    assert spool.rewind() == 5
    assert _ids(spool) == ["e1", "e2", "e3", "e4", "e5"]
    spool.close()


def test_an_event_keeps_its_trace_and_a_file_of_before_traces_is_taken_over(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as old:
        old.execute(
            "CREATE TABLE events (id INTEGER PRIMARY KEY, event_id TEXT NOT NULL, key BLOB NOT NULL, "
            "value BLOB NOT NULL)"
        )
        old.execute("INSERT INTO events VALUES (1, 'e1', x'00', x'00')")
        old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):
        spool = Spool(tmp_path / "s.db", limit=10**6)
        spool.append([Entry("e2", b"key", b"v", "00-ab")])
        found = [(row.event_id, row.traceparent) for row in spool.read(2)]
        spool.close()
    assert found == [("e1", ""), ("e2", "00-ab")]


def test_the_oldest_go_first_and_only_unsent_ones_count(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.db", limit=4 * SIZE)
    assert spool.append(_entries(1, 4)) == 0
    spool.advance(2)
    assert spool.append(_entries(5, 6)) == 0  # e1 and e2 went: the broker has them
    assert spool.append(_entries(7, 9)) == 3
    assert _ids(spool) == ["e6", "e7", "e8", "e9"]
    assert spool.append(_entries(10, 700)) == 691  # more than fits at once
    assert (spool.held, spool.waiting, spool.bytes) == (4, 4, 4 * SIZE)
    assert spool.append([Entry("big", b"", b"x" * 10_000)]) == 5
    assert (spool.held, spool.bytes, _ids(spool)) == (0, 0, [])
    spool.append(_entries(1, 1))
    assert _ids(spool) == ["e1"]
    spool.close()


def test_the_file_stays_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.db", limit=200 * SIZE)
    for turn in range(30):
        spool.append(_entries(turn * 100, turn * 100 + 99))
    spool.close()
    assert (tmp_path / "s.db").stat().st_size < 2 * 200 * SIZE


def test_everything_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    program = (
        "import os, pathlib\n"
        "from services.policy.spool import Entry, Spool\n"
        f"spool = Spool(pathlib.Path({str(path)!r}), limit=10**6)\n"
        "spool.append([Entry(f'e{n}', b'k', b'v') for n in range(1, 6)])\n"
        "spool.advance(2)\n"
        "spool.keep_topic_ids({'t': 'a'})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    spool = Spool(path, limit=10**6)
    assert _ids(spool) == ["e3", "e4", "e5"]
    assert spool.topic_ids == {"t": "a"}
    assert (spool.held, spool.waiting) == (5, 3)
    spool.close()


def test_one_process_holds_it(tmp_path: Path) -> None:
    first = Spool(tmp_path / "s.db", limit=10**6)
    with pytest.raises(errors.FailedPrecondition, match=r"s\.db is held by another process\. .*--listen"):
        Spool(tmp_path / "s.db", limit=10**6)
    first.close()
    Spool(tmp_path / "s.db", limit=10**6).close()


def test_what_is_no_spool_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"these are not the bytes of a database " * 100)
    with pytest.raises(errors.FailedPrecondition, match=r"s\.db is not a spool"):
        Spool(tmp_path / "s.db", limit=10**6)
    with sqlite3.connect(tmp_path / "later.db") as later:
        later.execute("PRAGMA user_version = 9")
    later.close()
    with pytest.raises(errors.FailedPrecondition, match=r"later\.db has format 9"):
        Spool(tmp_path / "later.db", limit=10**6)


def test_a_full_disk_is_said_and_leaves_what_there_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.db", limit=10**6)
    spool.append(_entries(1, 2))
    pages = spool._connection.execute("PRAGMA page_count").fetchone()[0]
    spool._connection.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite does on a full disk
    with pytest.raises(errors.NoSpace, match=str(tmp_path)):
        spool.append(_entries(3, 100))
    assert (spool.held, spool.waiting, _ids(spool)) == (2, 2, ["e1", "e2"])
    spool._connection.execute("PRAGMA max_page_count = 100000")
    spool.append(_entries(3, 3))
    assert _ids(spool) == ["e1", "e2", "e3"]
    spool.close()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.one_of(st.integers(1, 8), st.sampled_from(["ack", "rewind", "reopen"])), max_size=25),
    st.integers(1, 12),
)
def test_it_is_a_bounded_queue(steps: list[int | str], room: int) -> None:
    """Against a list: what is read is the newest that fit, less what was acknowledged; each drop is counted once."""
    with tempfile.TemporaryDirectory() as folder:
        path, limit = Path(folder, "s.db"), room * SIZE
        spool, number, acked = Spool(path, limit=limit), 0, 0
        model: list[int] = []
        for step in steps:
            if isinstance(step, int):
                model += range(number + 1, number + step + 1)
                gone, model = model[:-room], model[-room:]
                assert spool.append(_entries(number + 1, number + step)) == sum(each > acked for each in gone)
                number += step
            elif step == "ack" and (rows := spool.read(2)):
                acked = int(rows[-1].event_id[1:])
                spool.advance(rows[-1].id)
            elif step == "rewind":
                acked = 0
                assert spool.rewind() == len(model)
            elif step == "reopen":
                spool.close()
                spool = Spool(path, limit=limit)
            expected = [f"e{each}" for each in model if each > acked]
            assert [row.event_id for row in spool.read(1000)] == expected
            assert (spool.held, spool.waiting, spool.bytes) == (len(model), len(expected), len(model) * SIZE)
        spool.close()


def test_what_is_erased_is_off_the_disk_and_leaves_no_gap(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, limit=10**6)
    values = [b"mine-51c9" * 2_000 if number % 3 == 0 else b"yours" * 2_000 for number in range(9)]
    spool.append([Entry(f"e{number}", b"key-mine", value) for number, value in enumerate(values)])
    before = spool.bytes
    assert spool.erase(lambda value: value.startswith(b"mine")) == 3
    assert spool.bytes == before - 3 * (len(values[0]) + len(b"key-mine"))
    for file in tmp_path.iterdir():
        assert b"mine-51c9" not in file.read_bytes(), file
    assert [(row.id, row.value) for row in spool.read(100)] == [
        (number + 1, b"" if number % 3 == 0 else value) for number, value in enumerate(values)
    ]
    spool.append([Entry("e9", b"k", b"late")])
    spool.advance(9)
    assert [row.event_id for row in spool.read(100)] == ["e9"]
    assert spool.erase(lambda value: False) == 0
    spool.close()
    again = Spool(path, limit=10**6)
    assert (again.held, again.waiting) == (10, 1)
    again.close()
