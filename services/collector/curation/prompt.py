"""Curation of one prompt and its duplicates: from all their votes to a decision on each."""

from __future__ import annotations

from collections.abc import Iterable

from services.collector.curation.raters import Raters
from services.collector.curation.settings import CurationSettings
from services.collector.curation.votes import Decision, Overrides, Vote


def curate(
    votes: Iterable[Vote],
    raters: Raters,
    settings: CurationSettings | None = None,
    overrides: Overrides | None = None,
) -> list[Decision]:
    """A decision on each vote of one group of prompts of one tenant, in the order of their feedback ids.

    All votes of the group belong here, superseded ones included, retracted ones not. The order in which they come
    makes no difference. A later vote may change the decision on an earlier one: compare with what was decided before,
    and tell of what changed.
    """
    raise NotImplementedError
