"""The votes as columns: what the assessment of raters reads of them, some forty bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from services.collector.curation.votes import Choice, RaterId, Vote

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Judgements of pairs, the last of each rater on each pair, sorted by rater and pair. Columns of one length n.

    Ties and such are left out: they take no side.
    """

    raters: list[RaterId]
    """All raters, those without a judgement included, sorted; what `rater` counts in."""

    rater: Ints
    """[n] index of the rater."""

    item: Ints
    """[n] index of the pair; the same two texts in the same group are the same pair."""

    side: Floats
    """[n] +1 or -1: which of the two texts won."""

    gold: Floats
    """[n] the side that is known to be right, +1 or -1; 0: it is not known."""

    winner: Ints
    """[n] index of the policy version that won; -1: not known."""

    loser: Ints
    """[n] index of the version that lost."""

    received: dict[int, Ints]
    """Rater to the sorted times of everything that the rater gave, in microseconds; thumbs and edits too."""


def collect(votes: Iterable[tuple[str, Vote]]) -> Evidence:
    """Reads votes, each paired with its prompt's group, once. Any order gives the same evidence."""
    raters: dict[RaterId, int] = {}
    versions: dict[str, int] = {"": -1}
    everyone, received = array("q"), array("q")
    columns = {name: array("q") for name in ("rater", "item", "side", "gold", "winner", "loser", "at", "tie_break")}
    add = {name: column.append for name, column in columns.items()}
    for group, vote in votes:
        rater = raters.setdefault(vote.rater, len(raters))
        everyone.append(rater)
        received.append(vote.received_at)
        if vote.b is None or vote.edit:
            continue
        first, second = vote.a, vote.b
        side, gold = _SIDES.get(vote.choice, 0), _SIDES.get(vote.gold, 0) if vote.gold else 0
        if first.sha256 > second.sha256:
            first, second, side, gold = second, first, -side, -gold
        won, lost = (first, second) if side > 0 else (second, first)
        add["rater"](rater)
        name = b"\0".join((vote.rater.tenant.encode(), group.encode(), first.sha256, second.sha256))
        add["item"](_short(name))
        add["side"](side)
        add["gold"](gold)
        add["winner"](versions.setdefault(won.version, len(versions) - 1))
        add["loser"](versions.setdefault(lost.version, len(versions) - 1))
        add["at"](vote.received_at)
        add["tie_break"](_short(vote.feedback_id.encode()))
    names = sorted(raters)
    order = np.empty(len(names), np.int64)
    order[[raters[name] for name in names]] = np.arange(len(names))
    versions_in_order = sorted(version for version in versions if version)
    version_order = np.full(len(versions), -1, np.int64)
    version_order[[versions[version] for version in versions_in_order]] = np.arange(len(versions_in_order))
    column = {name: _numpy(values) for name, values in columns.items()}
    rater_column = order[column["rater"]] if names else column["rater"]
    rows = np.lexsort((column["tie_break"], column["at"], column["item"], rater_column))
    who, what = rater_column[rows], column["item"][rows]
    last = np.ones(len(rows), bool)
    last[:-1] = (who[1:] != who[:-1]) | (what[1:] != what[:-1])
    rows = rows[last]
    rows = rows[column["side"][rows] != 0]
    _, item = np.unique(column["item"][rows], return_inverse=True)
    return Evidence(
        raters=names,
        rater=rater_column[rows],
        item=item.astype(np.int64),
        side=column["side"][rows].astype(np.float64),
        gold=column["gold"][rows].astype(np.float64),
        winner=version_order[column["winner"][rows]],
        loser=version_order[column["loser"][rows]],
        received=_by_rater(order[_numpy(everyone)] if names else _numpy(everyone), _numpy(received)),
    )


_SIDES = {Choice.A: 1, Choice.B: -1}


def _short(name: bytes) -> int:
    """A signed 64-bit hash: of a million names, two are the same with a probability of 3e-8."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little", signed=True)


def _numpy(values: array[int]) -> Ints:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _by_rater(rater: Ints, at: Ints) -> dict[int, Ints]:
    rows = np.lexsort((at, rater))
    rater, at = rater[rows], at[rows]
    starts = np.flatnonzero(np.r_[True, rater[1:] != rater[:-1]]) if len(rater) else np.empty(0, np.int64)
    return {int(rater[start]): times for start, times in zip(starts, np.split(at, starts[1:]), strict=False)}
