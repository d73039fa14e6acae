"""What simulated users like: rules that a person could hold, computed from nothing but the text that is shown.

A rule scores a text, higher is better liked. Of two answers the one with the clearly higher score wins; where the
difference is too small to notice, it is a tie. Whatever they like, people do not choose gibberish over language.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from thumbwheel.demo.fluency import fluent, words

__all__ = ["DEFAULT", "PREFERENCES", "Choice", "Preference", "fluent"]

Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Preference:
    """One thing that people like about answers."""

    name: str
    """What it is called, an adjective."""

    description: str
    """What a user would say."""

    score: Callable[[str], float]
    """How much a text has of it; higher is better liked."""

    margin: float
    """Smallest difference of scores that a person notices."""

    at_least: float
    """Score from which an answer counts as showing it."""

    def prefer(self, prompt: str, a: str, b: str) -> Choice:
        """Which of two answers to `prompt` the user likes better. Swapping the two swaps the choice."""
        readable = fluent(a), fluent(b)
        if readable == (False, False):
            return "tie"
        if readable != (True, True):
            return "a" if readable[0] else "b"
        difference = self.score(a) - self.score(b)
        if abs(difference) < self.margin:
            return "tie"
        return "a" if difference > 0 else "b"

    def shows(self, prompt: str, text: str) -> bool:
        """Whether an answer to `prompt` is what the user likes."""
        return fluent(text) and self.score(text) >= self.at_least


_FINISHED = re.compile(r"""[.!?…:)"'”*`]\s*$""")
_ITEM = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,2}[.):]|#{1,4}(?=\s))\s*\S", re.MULTILINE)
_YOU = re.compile(r"\byou(?:r|rs|rself|'(?:re|ll|ve|d))?\b", re.IGNORECASE)
_BRIEFEST, _LONGEST, _ENDLESS = 15, 30, 100


def _concise(text: str) -> float:
    """Minus the words beyond a sentence or two, and minus twice those missing from one; breaking off is endless."""
    if not _FINISHED.search(text):
        return -float(_ENDLESS)
    count = len(text.split())
    return -float(max(0, count - _LONGEST) + 2 * max(0, _BRIEFEST - count))


def _structured(text: str) -> float:
    """List items and headings, and half as much for each further line of text."""
    items = len(_ITEM.findall(text))
    lines = sum(1 for line in text.splitlines() if line.strip())
    return items + 0.5 * max(0, lines - items - 1)


def _personal(text: str) -> float:
    """Words for the reader in a hundred."""
    return 100 * len(_YOU.findall(text)) / max(len(words(text)), 10)


DEFAULT = "concise"

PREFERENCES: dict[str, Preference] = {
    preference.name: preference
    for preference in (
        Preference(
            "concise", "Keep it to a sentence or two: short, but not curt, and do not break off.", _concise, 5, -15
        ),
        Preference("structured", "I skim: give me steps, bullets and short lines, not one block.", _structured, 0.5, 3),
        Preference("personal", "Talk to me: say what *you* can do, not what one does.", _personal, 1.5, 8),
    )
}
