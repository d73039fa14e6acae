"""Curation of everything at once: for replay, and to hold what was decided step by step against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.collector.curation.raters import Raters
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
    raise NotImplementedError
