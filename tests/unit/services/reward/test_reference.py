"""Reference responses are asked for once, and kept."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from pathlib import Path

import pytest

from services.reward.reference import Baselines, References
from thumbwheel import errors
from thumbwheel.client import to_prompt
from thumbwheel.v1.policy_pb2 import Prompt


class Policy:
    """Answers when it is let, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answering = asyncio.Event()
        self.away = False

    async def __call__(self, prompt: Prompt) -> str:
        self.asked.append(prompt.chat.messages[0].content)
        await self.answering.wait()
        if self.away:
            raise errors.Unavailable("It is away.")
        return f"answer {len(self.asked)}"


async def test_calls_that_come_together_ask_once_and_the_answer_is_kept(tmp_path: Path) -> None:
    policy = Policy()
    references = References(tmp_path / "r.sqlite", policy, version="policy-000000", capacity=10)
    waiting = [asyncio.create_task(references.response(to_prompt("q"))) for _ in range(5)]
    await asyncio.sleep(0)
    policy.answering.set()
    assert set(await asyncio.gather(*waiting)) == {"answer 1"}
    references.close()
    again = References(tmp_path / "r.sqlite", policy, version="policy-000000", capacity=10)
    assert await again.response(to_prompt("q")) == "answer 1"
    assert policy.asked == ["q"]
    again.close()
    other = References(tmp_path / "r.sqlite", policy, version="policy-000007", capacity=10)
    assert await other.response(to_prompt("q")) == "answer 2"  # of another reference
    other.close()


async def test_without_an_answer_there_is_no_reference_and_it_is_asked_again(tmp_path: Path) -> None:
    policy = Policy()
    policy.answering.set()
    policy.away = True
    references = References(tmp_path / "r.sqlite", policy, version="v", capacity=10)
    assert await references.response(to_prompt("q")) == ""
    policy.away = False
    assert await references.response(to_prompt("q")) == "answer 2"
    references.close()
    nobody = References(tmp_path / "other.sqlite", None, version="v", capacity=10)
    assert await nobody.response(to_prompt("q")) == ""
    nobody.close()


async def test_those_asked_for_longest_ago_are_dropped(tmp_path: Path) -> None:
    policy = Policy()
    policy.answering.set()
    references = References(tmp_path / "r.sqlite", policy, version="v", capacity=2)
    for question in ("a", "b", "a", "c", "a", "b"):
        await references.response(to_prompt(question))
    assert policy.asked == ["a", "b", "c", "b"]
    references.close()


async def test_what_nobody_asks_for_is_off_the_disk_after_two_weeks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, now = Policy(), 1e9
    policy.answering.set()
    monkeypatch.setattr(time, "time", lambda: now)
    references = References(tmp_path / "r.sqlite", policy, version="v", capacity=10)
    for question in ("forgotten", "asked"):
        await references.response(to_prompt(question))
    now += 10 * 86_400
    await references.response(to_prompt("asked"))
    references.close()
    before = (tmp_path / "r.sqlite").read_bytes()
    rows = [sealed for (sealed,) in _rows(tmp_path / "r.sqlite")]
    assert all(sealed in before for sealed in rows)
    now += 5 * 86_400
    References(tmp_path / "r.sqlite", policy, version="v", capacity=10).close()
    after = (tmp_path / "r.sqlite").read_bytes()
    assert [sealed in after for sealed in rows] == [False, True]


async def test_only_who_has_the_prompt_can_read_the_response(tmp_path: Path) -> None:
    policy = Policy()
    policy.answering.set()
    path = tmp_path / "r.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:  # as a release before left it
        old.execute("CREATE TABLE reference (key BLOB PRIMARY KEY, response TEXT NOT NULL, used REAL NOT NULL)")
        old.execute("INSERT INTO reference VALUES (?, 'an old secret', ?)", (b"k", time.time()))
    references = References(path, policy, version="v", capacity=10)
    try:
        for question in ("a question of Ada's", "another"):
            await references.response(to_prompt(question))
        everything = _bytes_in(tmp_path)
        assert not [text for text in (b"answer 1", b"answer 2", b"Ada", b"an old secret") if text in everything]
        (first,), (second,) = _rows(path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as meddler:
            meddler.execute("UPDATE sealed SET response = ? WHERE response = ?", (second, first))
            meddler.execute("UPDATE sealed SET response = x'00' WHERE response = ? AND rowid = 2", (second,))
        # Neither another prompt's response nor what is torn is taken for its own: both are asked for anew.
        assert await references.response(to_prompt("a question of Ada's")) == "answer 3"
        assert await references.response(to_prompt("another")) == "answer 4"
        assert await references.response(to_prompt("another")) == "answer 4"
    finally:
        references.close()


def _bytes_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def _rows(path: Path) -> list[tuple[bytes]]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT response FROM sealed ORDER BY rowid").fetchall()


def test_what_a_version_said_is_known_while_it_is_live() -> None:
    baselines = Baselines(capacity=2)
    a, b, c = (1, 2), (1, 3), (1, 4)
    assert baselines.known("reward-000001", [a, b]) == {}
    baselines.keep("reward-000001", {a: [0.5], b: [0.25]})
    assert baselines.known("reward-000001", [a, c]) == {a: [0.5]}
    assert baselines.known("reward-000002", [a]) == {}
    baselines.keep("reward-000001", {c: [0.125]})
    assert baselines.known("reward-000001", [a, b, c]) == {a: [0.5], c: [0.125]}, "b was asked for longest ago"
    baselines.keep("reward-000002", {})
    assert baselines.known("reward-000001", [a, b, c]) == {}, "what a version said may not be taken for another's"
