"""The demo's questions are many, real, and not seen twice."""

from __future__ import annotations

import itertools
import re
from collections import Counter

from thumbwheel.demo.prompts import all_prompts, held_out_prompts, train_prompts

_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an the i my me we our you your it its is are was be been do does did can could should would will and or but "
        "to of in on at for with from by about as than then that this these those what which who why how when where if "
        "not no have has had get make best good better way some any one s t m don difference between",
    )
)


def _content(prompt: str) -> set[str]:
    return {word for word in re.findall(r"[a-zé]+", prompt.lower()) if word not in _COMMON}


def test_there_are_enough_of_both_splits() -> None:
    assert len(train_prompts()) == 320
    assert len(held_out_prompts()) == 96


def test_a_part_of_the_held_out_is_of_all_topics() -> None:
    topics = {one.prompt: one.topic for one in all_prompts() if one.split == "held_out"}
    assert {topics[prompt] for prompt in held_out_prompts(16)} == set(topics.values())
    assert [len(set(held_out_prompts(count))) for count in (1, 7, 16, 95, 96)] == [1, 7, 16, 95, 96]


def test_no_question_is_in_both_splits_or_there_twice() -> None:
    assert not set(train_prompts()) & set(held_out_prompts())
    assert len({one.prompt.casefold() for one in all_prompts()}) == len(all_prompts())


def test_both_splits_have_the_same_share_of_every_topic() -> None:
    topics = Counter((one.split, one.topic) for one in all_prompts())
    names = {one.topic for one in all_prompts()}
    assert len(names) == 16
    assert {topics["train", name] for name in names} == {20}
    assert {topics["held_out", name] for name in names} == {6}


def test_questions_are_short_sentences() -> None:
    for one in all_prompts():
        assert 5 <= len(one.prompt.split()) <= 25, one.prompt
        assert one.prompt == one.prompt.strip(), one.prompt
        assert one.prompt[0].isupper(), one.prompt
        assert one.prompt[-1] in ".?!", one.prompt
        assert one.prompt.isprintable(), one.prompt


def test_no_two_questions_are_about_the_same_thing() -> None:
    """Their words other than the commonest overlap by less than half (Jaccard)."""
    for one, other in itertools.combinations(all_prompts(), 2):
        a, b = _content(one.prompt), _content(other.prompt)
        assert len(a & b) < 0.5 * len(a | b), (one.prompt, other.prompt)
