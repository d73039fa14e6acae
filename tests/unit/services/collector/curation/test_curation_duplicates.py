"""Which prompts are curated as one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.collector.curation import CurationSettings, PromptGroups

LONG = (
    "Please explain, in plain words and with an example from everyday life, how a heat pump moves warmth from the cold "
    "air outside into a house, why it needs less electricity than a heater, and what happens to it in hard frost."
)


def test_exact_duplicates_share_the_group_of_the_first() -> None:
    groups = PromptGroups()
    assert groups.add("acme", "p1", "What is a heat pump?") == "p1"
    assert groups.add("acme", "p2", "  what is a\nHEAT pump ") == "p1"
    assert groups.add("acme", "p1", "What is a heat pump?") == "p1"
    assert groups.add("globex", "p3", "What is a heat pump?") == "p3"


@pytest.mark.parametrize(
    ("one", "other"),
    [("2 + 2", "2 * 2"), ("Hi", "Hello"), ("!?", "??"), ("What is a heat pump?", "What is a heat sink?"), ("", "x")],
)
def test_small_prompts_that_differ_are_different(one: str, other: str) -> None:
    groups = PromptGroups()
    assert (groups.add("acme", "p1", one), groups.add("acme", "p2", other)) == ("p1", "p2")


def test_near_duplicates_share_the_group_of_the_first_of_their_kind() -> None:
    groups = PromptGroups()
    assert groups.add("acme", "p1", LONG) == "p1"
    assert groups.add("acme", "p2", LONG.replace("hard frost", "deep frost")) == "p1"
    assert groups.add("globex", "p3", LONG.replace("hard frost", "deep frost")) == "p3"
    assert groups.add("acme", "p4", LONG.replace("heat pump", "fridge").replace("house", "kitchen")) == "p4"


def test_a_chain_of_small_changes_does_not_become_one_group() -> None:
    groups, words = PromptGroups(), LONG.split()
    found = []
    for i in range(len(words)):
        words[i] = f"word{i}"
        found.append(groups.add("acme", f"p{i:02}", " ".join(words)))
    assert 5 <= len(set(found)) < len(found)


@pytest.mark.parametrize(("set_to", "surely", "surely_not"), [(0.7, 0.85, 0.5), (0.95, 0.999, 0.85)])
def test_similarity_is_as_set(set_to: float, surely: float, surely_not: float) -> None:
    """Held against the exact Jaccard similarity of word triples: clear cases fall on their side."""
    chance = random.Random(7)
    vocabulary = [f"w{i}" for i in range(5_000)]
    groups = PromptGroups(CurationSettings(duplicate_similarity=set_to))
    for number in range(200):
        words = chance.choices(vocabulary, k=60)
        changed = words.copy()
        for i in chance.sample(range(60), chance.randint(0, 12)):
            changed[i] = chance.choice(vocabulary)
        one, other = (set(zip(text, text[1:], text[2:], strict=False)) for text in (words, changed))
        similarity = len(one & other) / len(one | other)
        groups.add("acme", f"a{number}", " ".join(words))
        group = groups.add("acme", f"b{number}", " ".join(changed))
        if similarity > surely:
            assert group == f"a{number}"
        elif similarity < surely_not:
            assert group == f"b{number}"


def test_the_same_prompts_in_the_same_order_give_the_same_groups() -> None:
    chance = random.Random(3)
    prompts = [" ".join(chance.choices("abcdefgh", k=chance.randint(1, 12))) for _ in range(500)]
    runs = []
    for _ in range(2):
        groups = PromptGroups()
        runs.append([groups.add("acme", f"p{i}", text) for i, text in enumerate(prompts)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) < len(prompts)


@given(topics=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=120), most=st.integers(1, 20))
def test_what_it_remembers_is_bounded_and_the_newest_of_it_are_still_found(
    topics: list[tuple[int, int]], most: int
) -> None:
    """A topic is a long prompt, or a short one, with a word more at its end or none."""
    groups, found, last = PromptGroups(most=most), list[str](), dict[int, int]()
    for number, (topic, variant) in enumerate(topics):
        words = [f"topic{topic}w{i}" for i in range(40)] if topic % 3 else [f"topic{topic}"]
        found.append(groups.add("acme", f"p{number}", " ".join([*words, *[f"more{variant}"] * (topic % 3 > 0)])))
        if number - last.get(topic, -1_000) <= most:
            assert found[number] == found[last[topic]], "one like it is among the newest"
        assert groups.group("acme", f"p{number}") == found[number]
        assert len(groups) <= 2 * most
        last[topic] = number
