"""Which two responses to show next: probabilities first, then one draw, so that every pick has a known propensity.

    eligible pairs ─┬─ a fixed share: any of them alike             RANDOM      unbiased measurement
                    ├─ a share: two policy versions, any alike      DUEL        which version is better
                    └─ the rest: least sure by the reward model     UNCERTAIN   what it learns most from

The propensity of a pair in an order is the sum over the strategies that could have picked it, halved for the order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from sqlalchemy import Connection, select

from services.collector.picked import Pair
from services.collector.rules import Shares
from services.collector.tables import feedback, generations, shown

RANDOM, DUEL, UNCERTAIN = "RANDOM", "DUEL", "UNCERTAIN"
MAX_A_PROMPT = 8
"""Newest responses to a prompt that are paired with one another."""


class Eligible(NamedTuple):
    """A pair that may be shown to a user."""

    pair: Pair
    duel: bool
    """The responses come from different policy versions."""


class Pick(NamedTuple):
    """What is shown."""

    pair: Pair
    propensity: float
    strategy: str


def eligible(connection: Connection, tenant: str, user_id: str, window: int) -> list[Eligible]:
    """Pairs among the tenant's `window` newest responses that this user has neither seen nor judged, newest first.

    A pair answers one prompt, as the model saw it, with two different texts.
    """
    names = ("generation_id", "prompt_sha256", "text_sha256", "version")
    newest = (
        select(*(generations.c[name] for name in names))
        .where(
            generations.c.tenant == tenant,
            generations.c.prompt_sha256.is_not(None),
            generations.c.empty.is_(False),
            generations.c.consent,
        )
        .order_by(generations.c.stored_at.desc(), generations.c.generation_id.desc())
        .limit(window)
    )
    by_prompt: dict[bytes, list[tuple[str, bytes, str]]] = {}
    for id, prompt, text, version in connection.execute(newest):
        answers = by_prompt.setdefault(bytes(prompt), [])
        if len(answers) < MAX_A_PROMPT:
            answers.append((id, bytes(text), version))
    seen_by = (shown.c.tenant == tenant) & (shown.c.user_id == user_id)
    judged_by = (feedback.c.tenant == tenant) & (feedback.c.user_id == user_id) & feedback.c.item.is_not(None)
    seen = {bytes(item) for item in connection.execute(select(shown.c.item).where(seen_by)).scalars()}
    seen |= {bytes(item) for item in connection.execute(select(feedback.c.item).where(judged_by)).scalars()}
    found = []
    for answers in by_prompt.values():
        for (a, text_a, version_a), (b, text_b, version_b) in combinations(answers, 2):
            pair = Pair(a, b)
            if text_a != text_b and pair.item not in seen:
                found.append(Eligible(pair, bool(version_a and version_b) and version_a != version_b))
    return found


def probabilities(
    pairs: Sequence[Eligible], shares: Shares, unsure: Mapping[Pair, float]
) -> dict[Pair, dict[str, float]]:
    """By pair and strategy, the probability of being picked, in either order. They add up to 1.

    `unsure` maps pairs to how unsure the reward model is of them; empty where it was not asked. A strategy that has
    nothing to pick from leaves its share to the others: duels to uncertainty, uncertainty to duels, and both to chance.
    """
    duels = [one.pair for one in pairs if one.duel]
    chance, duel = shares.random, shares.duel
    uncertain = max(0.0, 1.0 - chance - duel)
    if not unsure:
        duel, uncertain = duel + uncertain, 0.0
    if not duels:
        duel, uncertain, chance = 0.0, uncertain + duel if unsure else 0.0, chance + (0.0 if unsure else duel)
    found: dict[Pair, dict[str, float]] = {one.pair: {RANDOM: chance / len(pairs)} for one in pairs}
    for pair in duels:
        found[pair][DUEL] = duel / len(duels)
    if unsure:
        found[max(unsure, key=lambda pair: (unsure[pair], pair))][UNCERTAIN] = uncertain
    return found


def pick(chances: Mapping[Pair, Mapping[str, float]], draw: random.Random) -> Pick:
    """Draws a pair, the strategy that it was drawn by, and the order."""
    options = [(pair, strategy) for pair, by in chances.items() for strategy in by]
    weights = [chances[pair][strategy] for pair, strategy in options]
    pair, strategy = draw.choices(options, weights)[0]
    propensity = sum(chances[pair].values()) / 2
    shown_pair = pair if draw.random() < 0.5 else Pair(pair.second, pair.first)
    return Pick(shown_pair, propensity, strategy)
