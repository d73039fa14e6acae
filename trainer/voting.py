"""Who votes is not drawn by lot: thumbs weighted by how seldom responses like theirs are voted on.

Long answers are read to the end by few, so that a model that learns from thumbs as they come learns mostly of short
ones. A thumb on a response of a length is weighted by the inverse of the share of such responses that got one, relative
to all (stabilised inverse propensity weights; Robins et al., 2000, Epidemiology 11(5); for feedback on ranked answers
Joachims et al., 2017, arXiv 1608.04468):

    w = p / p_s        p_s = (voted_s + K p) / (shown_s + K)        s: 1, 2-3, 4-7, 8-15, … tokens

K shows of no information keep what was hardly seen near 1, and weights are cut at 1/4 and 4. What depends on the user
or on the answer's quality cannot be told from what is on the stream, and is not corrected.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thumbwheel import errors
from trainer.samples import Sample, Thumb

VOTING = "voting.json"

PRIOR_SHOWS = 50
"""K."""
GREATEST_WEIGHT = 4.0
"""The least is its inverse."""


@dataclass
class Voting:
    """How many responses of each length were shown to people, and how many of them got a thumb."""

    shown: Counter[int] = field(default_factory=Counter)
    voted: Counter[int] = field(default_factory=Counter)

    def show(self, tokens: int) -> None:
        """Counts a response of so many tokens that was shown to somebody."""
        self.shown[tokens.bit_length()] += 1

    def vote(self, tokens: int) -> None:
        """Counts a thumb on a response of so many tokens."""
        self.voted[tokens.bit_length()] += 1

    def weight(self, tokens: int) -> float:
        """The weight of a thumb on a response of so many tokens; 1 where nothing is known of what was shown."""
        overall = self.voted.total() / max(self.shown.total(), self.voted.total(), 1)
        if not self.shown.total() or not overall:
            return 1.0
        stratum = tokens.bit_length()
        shown = max(self.shown[stratum], self.voted[stratum])  # a thumb can be here before its response
        share = (self.voted[stratum] + PRIOR_SHOWS * overall) / (shown + PRIOR_SHOWS)
        return min(GREATEST_WEIGHT, max(1 / GREATEST_WEIGHT, overall / share))

    def weighted(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, thumbs with what they had as weight times this one."""
        return [
            dataclasses.replace(sample, weight=sample.weight * self.weight(len(sample.response)))
            if isinstance(sample, Thumb)
            else sample
            for sample in samples
        ]

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        (folder / VOTING).write_text(json.dumps({"shown": self.shown, "voted": self.voted}))

    @classmethod
    def load(cls, folder: Path) -> Voting:
        """Reads what `save` wrote; nothing where an older checkpoint has none. Raises `errors.CorruptCheckpoint`."""
        path = folder / VOTING
        if not path.exists():
            return cls()
        try:
            fields = json.loads(path.read_text())
            counts = [
                Counter({int(at): int(count) for at, count in fields[name].items()}) for name in ("shown", "voted")
            ]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise errors.CorruptCheckpoint(
                f"{path} cannot be read: {error}.", remedy="Was it written by another release?"
            ) from error
        return cls(*counts)
