"""Curation of everything at once: for replay, and to hold what was decided step by step against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.collector.curation.prompt import curate
from services.collector.curation.raters import Raters, assess
from services.collector.curation.settings import CurationSettings
from services.collector.curation.votes import Decision, Overrides, Vote


@dataclass(frozen=True, slots=True)
class Result:
    """The snapshot, and a decision on each vote, in the order of feedback ids."""

    raters: Raters
    decisions: list[Decision]


def curate_all(
    votes: Sequence[Vote],
    settings: CurationSettings | None = None,
    overrides: Overrides | None = None,
    groups: Mapping[str, str] | None = None,
) -> Result:
    """Assesses all raters and curates all groups. Any order of the votes gives the same result.

    `groups` maps prompt ids to their groups; a prompt that is not there is a group of its own.
    """
    settings = settings or CurationSettings()
    group_of = groups or {}
    raters = assess(((group_of.get(vote.prompt_id, vote.prompt_id), vote) for vote in votes), settings, overrides)
    by_group: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        by_group[vote.rater.tenant, group_of.get(vote.prompt_id, vote.prompt_id)].append(vote)
    decisions = [
        decision for of_group in by_group.values() for decision in curate(of_group, raters, settings, overrides)
    ]
    decisions.sort(key=lambda decision: decision.feedback_id)
    return Result(raters, decisions)
