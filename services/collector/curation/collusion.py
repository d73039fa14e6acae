"""Groups of accounts that vote as one. One account's taste is never collusion, however strong; many equal tastes are.

Two signs, each found on its own:

- *one-sided*: accounts that let one policy version win, or lose, far more often than the population does against the
  same opponents. Likelihood tests on voting histories are how vote rigging is found in public leaderboards
  (Huang et al. 2025, arXiv 2501.07493); here the population counts each account alike, so that many votes of few
  accounts do not become the norm, and it takes a group larger than chance gives.
- *lockstep*: accounts that dissent together, pair by pair, from all others who judged the same.

An honest account's votes are correlated, because people have tastes: `taste_correlation` says how much. It is not
estimated from the votes, since colluders would raise the estimate and hide behind it.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

from services.collector.curation.chance import poisson_tail, tail
from services.collector.curation.evidence import Bools, Evidence, Ints
from services.collector.curation.settings import CurationSettings

_ROUNDS = 4
_NEIGHBOURS = 16
"""Of an item with more raters than this, each is held against so many others, not against all."""

_LEAST_DISSENT = 0.1
"""How often two honest raters dissent together at least: some pairs are hard, and mislead many."""


def colluders(evidence: Evidence, settings: CurationSettings) -> Bools:
    """[raters] True for those that belong to a colluding group."""
    found = np.zeros(len(evidence.raters), bool)
    for _ in range(_ROUNDS):
        # Without those already found, the population is seen more clearly.
        more = _one_sided(evidence, found, settings) | _lockstep(evidence, found, settings)
        if not (more & ~found).any():
            break
        found |= more
    return found


def _one_sided(evidence: Evidence, known: Bools, settings: CurationSettings) -> Bools:
    found = np.zeros(len(evidence.raters), bool)
    rows = (evidence.winner != evidence.loser) & (evidence.winner >= 0) & (evidence.loser >= 0) & (evidence.gold == 0)
    if not rows.any():
        return found
    # Each judgement twice: seen from the version that won, and from the one that lost.
    rater = np.r_[evidence.rater[rows], evidence.rater[rows]]
    target = np.r_[evidence.winner[rows], evidence.loser[rows]]
    opponent = np.r_[evidence.loser[rows], evidence.winner[rows]]
    won = np.r_[np.ones(rows.sum()), np.zeros(rows.sum())]
    versions = int(target.max()) + 1
    account, of = np.unique(rater * versions + target, return_inverse=True)
    votes = np.bincount(of).astype(np.float64)
    wins = np.bincount(of, won)
    # The usual rate of target against opponent, in which no account has more say than `collusion_votes` votes.
    say = np.minimum(1.0, settings.collusion_votes / votes)[of] * ~known[rater]
    _, duel = np.unique(target * versions + opponent, return_inverse=True)
    usual = (np.bincount(duel, say * won) + 1.0) / (np.bincount(duel, say) + 2.0)
    expected = np.bincount(of, usual[duel]) / votes
    several = votes >= settings.collusion_votes
    chance = tail(votes, wins / votes, expected, settings.taste_correlation)
    for version in range(versions):
        here = several & (account % versions == version)
        for side in (wins / votes > expected, wins / votes < expected):
            suspects = account[here & side & (chance < settings.account_chance)] // versions
            by_chance = here.sum() * settings.account_chance
            if len(suspects) >= settings.collusion_accounts and (
                poisson_tail(len(suspects), by_chance) < settings.group_chance
            ):
                found[suspects] = True
    return found


def _lockstep(evidence: Evidence, known: Bools, settings: CurationSettings) -> Bools:
    found = np.zeros(len(evidence.raters), bool)
    everyone = np.arange(len(evidence.raters))
    count = np.bincount(evidence.item)
    lean = np.bincount(evidence.item, evidence.side)
    # Only where there is somebody to dissent from, and somebody who dissents.
    rows = np.flatnonzero((count >= 4)[evidence.item] & (np.abs(lean) < count)[evidence.item])
    rows = rows[np.lexsort((evidence.rater[rows], evidence.item[rows]))]
    item, rater, side = evidence.item[rows], evidence.rater[rows], evidence.side[rows]
    keys: list[Ints] = []
    joint: list[Bools] = []
    for step in range(1, _NEIGHBOURS + 1):
        same = item[step:] == item[:-step]
        if not same.any():
            break
        one, other = np.flatnonzero(same), np.flatnonzero(same) + step
        keys.append(rater[one] * len(everyone) + rater[other])
        agree = side[one] == side[other]
        joint.append(agree & (side[one] * (lean[item[one]] - side[one] - side[other]) < 0))
    if not keys:
        return found
    pair, of = np.unique(np.concatenate(keys), return_inverse=True)
    shared = np.bincount(of).astype(np.float64)
    dissent = np.bincount(of, np.concatenate(joint)) / shared
    first, second = pair // len(everyone), pair % len(everyone)
    honest = ~known[first] & ~known[second]
    usual = max(_LEAST_DISSENT, float(dissent[honest].mean()) if honest.any() else 0.0)
    chance = tail(shared, dissent, np.full(len(pair), usual), settings.taste_correlation)
    linked = (shared >= settings.collusion_votes) & (dissent > usual) & (chance < settings.group_chance)
    graph: nx.Graph[int] = nx.Graph(zip(first[linked].tolist(), second[linked].tolist(), strict=True))
    for group in nx.connected_components(graph):
        if len(group) >= settings.collusion_accounts:
            found[list(group)] = True
    return found
