"""Prompts stand as long as the feedback that brought them, and are used as often as is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from thumbwheel import errors
from trainer.prompts import PROMPTS, Prompts


def ids(prompts: Prompts, count: int) -> list[str]:
    return [prompt.id for prompt in prompts.take(count)]


def test_the_same_prompt_counts_once_and_is_used_as_often_as_is_said() -> None:
    prompts = Prompts(uses=2)
    assert prompts.add("a", (1, 2))
    assert not prompts.add("b", (1, 2))
    assert not prompts.add("a", (1, 2))
    assert prompts.add("c", (3,))
    first = prompts.take(5)
    assert [(prompt.id, prompt.tokens) for prompt in first] == [("a/1", (1, 2)), ("c/1", (3,))]
    assert (len(prompts), prompts.take(5)) == (0, []), "what is asked is not asked twice at once"
    assert all(prompts.came_back(prompt) for prompt in first)
    prompts.add("d", (4,))
    assert ids(prompts, 2) == ["d/1", "a/2"], "what was used least comes first"
    assert ids(prompts, 5) == ["c/2"]
    assert ids(prompts, 5) == []


def test_a_prompt_goes_with_the_last_feedback_that_stands_for_it() -> None:
    prompts = Prompts(uses=1)
    prompts.add("a", (1,))
    prompts.add("b", (1,))
    prompts.add("c", (2,))
    prompts.retract("a")
    prompts.retract("unknown")
    asked = prompts.take(5)
    assert [prompt.id for prompt in asked] == ["b/1", "c/1"]
    prompts.retract("b")
    assert [prompts.came_back(prompt) for prompt in asked] == [False, True]
    assert len(prompts) == 0


def test_what_is_asked_and_not_back_waits_again_after_a_crash(tmp_path: Path) -> None:
    prompts = Prompts(uses=2)
    prompts.add("a", (1, 2))
    prompts.add("b", (3,))
    prompts.refer({(1, 2): "an answer", (9,): "to nothing"})
    (first,) = prompts.take(1)
    prompts.came_back(first)
    prompts.take(2)
    prompts.save(tmp_path)
    again = Prompts.load(tmp_path, uses=2)
    taken = again.take(5)
    assert [(prompt.id, prompt.reference) for prompt in taken] == [("b/1", ""), ("a/2", "an answer")]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert len(Prompts.load(tmp_path, uses=1)) == 0
    (tmp_path / PROMPTS).write_text('{"prompt": [1]}\n')
    with pytest.raises(errors.CorruptCheckpoint, match=r"prompts.jsonl cannot be read: 'sources'"):
        Prompts.load(tmp_path, uses=1)


def test_of_too_many_those_used_most_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.prompts.MOST", 2)
    prompts = Prompts(uses=3)
    for name, token in (("a", 1), ("b", 2)):
        prompts.add(name, (token,))
    (asked, _) = prompts.take(2)
    prompts.came_back(asked)
    prompts.add("c", (3,))
    assert ids(prompts, 5) == ["c/1"], "a is gone, b is asked"
