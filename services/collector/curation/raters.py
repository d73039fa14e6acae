"""How far each rater can be relied on: agreement with others and with control questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from services.collector.curation.reasons import Reason
from services.collector.curation.settings import CurationSettings
from services.collector.curation.votes import Overrides, RaterId, Vote


@dataclass(frozen=True, slots=True)
class Rater:
    """What is known of a rater."""

    reliability: float
    """Estimated probability of judging as the truth is, 0 to 1; a half is a coin."""

    weight: float
    """What a vote of the rater weighs, 0 to 1: reliability, times what the caps leave of it."""

    votes: int = 0
    """Comparisons seen, superseded ones not."""

    judged: float = 0.0
    """How many of them others, or gold, could judge; a certain judgement counts 1, an uncertain one less."""

    gold_judged: int = 0
    """Control questions answered."""

    gold_correct: int = 0
    """Of them, answered correctly."""

    quarantine: Reason | None = None
    """Why the whole account is quarantined; None: it is not."""

    bursts: tuple[tuple[int, int], ...] = ()
    """Half-open intervals of `received_at` whose votes are quarantined, in order."""


@dataclass(frozen=True, slots=True)
class Raters:
    """A snapshot of all raters. Computed now and then from all votes; `curate` then judges single prompts by it."""

    newcomer: Rater
    """What a rater is taken for who is not in `known`."""

    known: Mapping[RaterId, Rater] = field(default_factory=dict)
    """Raters of whom there is evidence."""

    def __getitem__(self, rater: RaterId) -> Rater:
        return self.known.get(rater, self.newcomer)

    def __iter__(self) -> Iterator[RaterId]:
        return iter(self.known)

    @classmethod
    def none(cls, settings: CurationSettings) -> Raters:
        """The snapshot before there is any evidence: everybody is a newcomer of weight 1."""
        return cls(Rater(settings.prior_accuracy, 1.0))


def assess(votes: Iterable[tuple[str, Vote]], settings: CurationSettings, overrides: Overrides | None = None) -> Raters:
    """The snapshot that these votes give, each paired with its prompt's group. Any order of them gives the same.

    Reads them once and keeps some tens of bytes of each, so they may come straight from a database cursor.
    """
    raise NotImplementedError
