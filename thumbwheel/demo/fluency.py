"""Whether a text reads as language at all: the check that a model learnt from people without falling apart."""

from __future__ import annotations

import re
from collections.abc import Iterator

FEWEST_WORDS = 3
"""Fewer words than this are no answer."""

LEAST_READABLE = 0.6
"""Least share of the whitespace-separated pieces that hold a plain word or a number."""

MOST_REPEATED = 0.4
"""Most of the word trigrams that may have occurred before in the same text. A loop repeats nearly all of its own."""

LONGEST_RUN = 5
"""A word, or a phrase of up to four words, said so often in a row is a loop, however the rest reads."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_READABLE = re.compile(r"[A-Za-z0-9]")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without numbers and punctuation; "don't" and "well-known" are one each."""
    return [word.lower() for word in _WORD.findall(text)]


def fluent(text: str) -> bool:
    """Whether `text` has a few words, is mostly readable, and does not go round in circles.

    It says nothing about truth or sense: it fails on emptiness, on symbols, and on repetition, which is how a language
    model breaks when it is trained too hard.
    """
    spoken, pieces = words(text), text.split()
    if len(spoken) < FEWEST_WORDS:
        return False
    readable = sum(1 for piece in pieces if _READABLE.search(piece))
    if readable < LEAST_READABLE * len(pieces):
        return False
    return repetition(spoken) <= MOST_REPEATED and not any(_runs(spoken))


def repetition(spoken: list[str]) -> float:
    """Share of the word trigrams that occurred before, 0 to 1; 0 for fewer than three words."""
    trigrams = list(zip(spoken, spoken[1:], spoken[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _runs(spoken: list[str]) -> Iterator[int]:
    """Places where a phrase of one to four words begins that is then said `LONGEST_RUN` times in a row."""
    for size in range(1, 5):
        same = 0
        for index in range(len(spoken) - size):
            same = same + 1 if spoken[index] == spoken[index + size] else 0
            if same >= size * (LONGEST_RUN - 1):
                yield index
