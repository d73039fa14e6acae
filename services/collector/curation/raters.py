"""How far each rater can be relied on: agreement with others and with control questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from services.collector.curation.chance import tail
from services.collector.curation.collusion import colluders
from services.collector.curation.evidence import Bools, Evidence, Floats, Ints, collect
from services.collector.curation.influence import bursts, shares
from services.collector.curation.reasons import Reason
from services.collector.curation.settings import CurationSettings
from services.collector.curation.votes import Overrides, RaterId, Vote

_ROUNDS = 20
_MOST_SKILL = 0.9
"""Nobody's word is taken for more than that of somebody who is right in 95 of 100 cases."""


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


def assess(
    votes: Iterable[tuple[str, Vote]], settings: CurationSettings | None = None, overrides: Overrides | None = None
) -> Raters:
    """The snapshot that these votes give, each paired with its prompt's group. Any order of them gives the same.

    Reads them once and keeps some tens of bytes of each, so they may come straight from a database cursor.
    """
    settings = settings or CurationSettings()
    overrides = overrides or Overrides()
    evidence = collect(votes)
    fast = bursts(evidence, settings)
    share = shares(evidence, settings)
    colluding = colluders(evidence, settings)
    released = np.array([rater in overrides.released for rater in evidence.raters], bool)
    quarantined = np.array([rater in overrides.quarantined for rater in evidence.raters], bool)
    # Whoever may not count does not say what is right either.
    silent = (colluding | quarantined) & ~released
    silent[[rater for rater, intervals in fast.items() if _mostly(evidence.received[rater], intervals)]] = True
    estimate = _reliability(evidence, np.where(silent, 0.0, share), settings)
    newcomer = Raters.none(settings).newcomer
    votes_of = np.bincount(evidence.rater, minlength=len(evidence.raters))
    unreliable = _unreliable(estimate, settings)
    known: dict[RaterId, Rater] = {}
    for i, rater in enumerate(evidence.raters):
        skill = float(estimate.skill[i])
        relative = skill / _prior_skill(settings)
        quarantine = None
        if colluding[i]:
            quarantine = Reason.QUARANTINED_COLLUSION
        elif unreliable[i]:
            quarantine = Reason.QUARANTINED_UNRELIABLE
        weight = min(1.0, max(settings.min_weight, relative)) * float(share[i])
        known[rater] = Rater(
            reliability=round((1.0 + skill) / 2.0, 6),
            weight=round(weight, 6),
            votes=int(votes_of[i]),
            judged=round(float(estimate.judged[i]), 3),
            gold_judged=int(estimate.gold_judged[i]),
            gold_correct=int(estimate.gold_correct[i]),
            quarantine=quarantine,
            bursts=fast.get(i, ()),
        )
    return Raters(newcomer, known)


@dataclass(frozen=True, slots=True)
class _Estimate:
    skill: Floats
    """[raters] 2p - 1, where p is the probability of being right."""

    judged: Floats
    gold_judged: Floats
    gold_correct: Ints


def _reliability(evidence: Evidence, say: Floats, settings: CurationSettings) -> _Estimate:
    """One-coin Dawid-Skene (1979): each rater is right with a probability p of its own, whichever side is right.

    The truth of a pair is estimated from the others who judged it, never from the rater's own vote, by their log-odds;
    `say` [raters] scales what each adds. With c the estimate's mean, -1 to 1, a rater's vote s has the mean
    `(2p - 1)·c`, so `2p - 1` is the slope `Σ s·c / Σ c²` of a regression, shrunk towards the prior by `prior_votes`.
    Gold is a pair with c = ±1.
    """
    size = len(evidence.raters)
    prior = _prior_skill(settings)
    gold = evidence.gold != 0
    correct = gold & (evidence.gold == evidence.side)
    rater, item, side = evidence.rater[~gold], evidence.item[~gold], evidence.side[~gold]
    right = np.bincount(evidence.rater[gold], np.where(correct[gold], 1.0, -1.0), minlength=size)
    of_gold = np.bincount(evidence.rater[gold], minlength=size).astype(np.float64)
    skill: Floats = np.full(size, prior)
    judged = of_gold
    for _ in range(_ROUNDS):
        strength = say * 2.0 * np.arctanh(np.clip(skill, 0.0, _MOST_SKILL))
        own = side * strength[rater]
        total = np.bincount(item, own)
        others = np.tanh((total[item] - own) / 2.0)
        judged = of_gold + np.bincount(rater, others**2, minlength=size)
        agreement = right + np.bincount(rater, side * others, minlength=size)
        skill = np.clip((prior * settings.prior_votes + agreement) / (settings.prior_votes + judged), -1.0, 1.0)
    return _Estimate(skill, judged, of_gold, np.bincount(evidence.rater[correct], minlength=size))


def _unreliable(estimate: _Estimate, settings: CurationSettings) -> Bools:
    """[raters] True where the weight would be next to nothing, or control questions are failed beyond chance.

    Gold is looked at by itself, since those who agree with each other alone look reliable to each other.
    """
    little = estimate.skill < settings.min_weight * _prior_skill(settings)
    rate = estimate.gold_correct / np.maximum(estimate.gold_judged, 1)
    usual = np.full(len(rate), settings.prior_accuracy)
    by_chance = tail(estimate.gold_judged, rate, usual)
    failed = (rate < usual) & (by_chance < settings.account_chance)
    unreliable: Bools = failed | ((estimate.judged >= settings.min_judged) & little)
    return unreliable


def _prior_skill(settings: CurationSettings) -> float:
    return 2.0 * settings.prior_accuracy - 1.0


def _mostly(times: Ints, intervals: tuple[tuple[int, int], ...]) -> bool:
    inside = sum(int(((times >= start) & (times < end)).sum()) for start, end in intervals)
    return 2 * inside > len(times)
