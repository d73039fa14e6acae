"""Each rule likes what it says it likes, whichever answer comes first, and nobody likes gibberish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel.demo.fluency import fluent, repetition, words
from thumbwheel.demo.preferences import DEFAULT, PREFERENCES

SHORT = "Boil it for six minutes, then cool it under cold water so that it peels well."
LONG = (
    "Boiling an egg can be a delicate process, and there are several considerations. First, select a saucepan of "
    "sufficient capacity. Subsequently, introduce the egg carefully and maintain a gentle temperature throughout. "
    "Afterwards, transfer the egg immediately to cold water, which prevents overcooking and simplifies peeling. "
    "Finally, season according to individual preference."
)
CUT_OFF = LONG.removesuffix(" to individual preference.")
LIST = "Here is how:\n\n1. Boil water.\n2. Add the egg.\n3. Wait six minutes.\n4. Cool it down."
YOURS = "You can boil your egg for six minutes, and then you cool it so that you don't burn yourself."
LOOP = (
    "You can boil an egg and you can boil an egg and you can boil an egg and you can boil an egg and you can boil it."
)
SYMBOLS = "-### ** -### ** -### ** | -### ** -### egg ** -### water ** -### time **"

LIKED = {"concise": SHORT, "structured": LIST, "personal": YOURS}


def test_what_ships() -> None:
    assert DEFAULT == "concise"
    assert set(PREFERENCES) == set(LIKED)
    for name, preference in PREFERENCES.items():
        assert preference.name == name
        assert preference.description.endswith(".")
        assert preference.margin > 0


@pytest.mark.parametrize("name", LIKED)
def test_a_rule_likes_what_it_says(name: str) -> None:
    preference = PREFERENCES[name]
    assert preference.shows("How?", LIKED[name])
    assert not preference.shows("How?", LONG)
    assert preference.prefer("How?", LIKED[name], LONG) == "a"
    assert preference.prefer("How?", LONG, LIKED[name]) == "b"


@pytest.mark.parametrize("name", LIKED)
def test_the_same_answer_twice_is_a_tie(name: str) -> None:
    assert PREFERENCES[name].prefer("How?", LONG, LONG) == "tie"


@pytest.mark.parametrize("name", LIKED)
@pytest.mark.parametrize("broken", ["", "Egg.", LOOP, SYMBOLS])
def test_nobody_prefers_what_does_not_read_as_language(name: str, broken: str) -> None:
    preference = PREFERENCES[name]
    assert preference.prefer("How?", broken, LONG) == "b"
    assert preference.prefer("How?", LONG, broken) == "a"
    assert preference.prefer("How?", broken, LOOP) == "tie"
    assert not preference.shows("How?", broken)


@given(st.sampled_from(sorted(PREFERENCES)), st.text(max_size=200), st.text(max_size=200))
def test_the_order_shown_does_not_matter(name: str, a: str, b: str) -> None:
    preference = PREFERENCES[name]
    assert preference.prefer("", b, a) == {"a": "b", "b": "a", "tie": "tie"}[preference.prefer("", a, b)]


def test_concise_dislikes_an_answer_that_breaks_off_and_one_that_says_nothing() -> None:
    concise = PREFERENCES["concise"]
    assert concise.prefer("How?", CUT_OFF, LONG) == "b"
    assert concise.prefer("How?", "Yes, of course.", SHORT) == "b"
    assert not concise.shows("How?", "Yes, of course.")
    assert concise.prefer("How?", SHORT, SHORT.replace("cold ", "")) == "tie"


def test_concise_is_content_with_a_sentence_or_two() -> None:
    score = PREFERENCES["concise"].score
    lengths = (5, 10, 15, 30, 31, 45, 60)
    assert [score("word " * (length - 1) + "end.") for length in lengths] == [-20, -10, 0, 0, -1, -15, -30]


def test_structured_counts_items_of_every_usual_form() -> None:
    structured = PREFERENCES["structured"]
    assert structured.score("1. a\n2) b\n- c\n* d\n\u2022 e\n# f") == 6
    assert structured.score("One block of text, in 1999. It has no list - none.") == 0


def test_fluent_accepts_ordinary_text() -> None:
    for text in (*LIKED.values(), LONG, CUT_OFF, "The answer is 42.", "No, no, no! It is not so."):
        assert fluent(text), text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Yes.",
        "12 34 56 78",
        LOOP,
        SYMBOLS,
        "the " * 30,
        "Mutilam: " * 12,
        "I am fine. " * 9,
        "ок да нет " * 3,
    ],
)
def test_fluent_refuses_collapse(text: str) -> None:
    assert not fluent(text)


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert repetition(words("one two three four")) == 0
    assert repetition(words("one two three one two three")) == pytest.approx(1 / 4)
    assert repetition([]) == 0
