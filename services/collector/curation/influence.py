"""How much one rater may count: no more than a few times the usual rater, and not what no person could have given."""

from __future__ import annotations

import numpy as np

from services.collector.curation.evidence import Evidence, Floats, Ints
from services.collector.curation.settings import CurationSettings

MINUTE = 60_000_000
DAY = 86_400_000_000


def shares(evidence: Evidence, settings: CurationSettings) -> Floats:
    """[raters] what the cap on the whole leaves of each rater's weight, above 0 to 1.

    A rater's judgements weigh together at most `user_share_of_median` times those of the median rater of the tenant,
    and are never bound below `user_share_floor` of them.
    """
    count = np.bincount(evidence.rater, minlength=len(evidence.raters)).astype(np.float64)
    _, tenant = np.unique([rater.tenant for rater in evidence.raters], return_inverse=True)
    share = np.ones(len(evidence.raters))
    for one in range(int(tenant.max(initial=-1)) + 1):
        here = np.flatnonzero((tenant == one) & (count > 0))
        if len(here):
            most = max(float(settings.user_share_floor), settings.user_share_of_median * float(np.median(count[here])))
            share[here] = np.minimum(1.0, most / count[here])
    return share


def bursts(evidence: Evidence, settings: CurationSettings) -> dict[int, tuple[tuple[int, int], ...]]:
    """Rater to the half-open intervals, in microseconds, in which the rater was faster than people are.

    A clock minute is a burst where it holds more votes than anybody may give, and many times more than the usual
    minute of this rater or of the population; a UTC day is one beyond what any person gives.
    """
    minutes = {rater: np.unique(times // MINUTE, return_counts=True) for rater, times in evidence.received.items()}
    own = {rater: float(np.median(counts)) for rater, (_, counts) in minutes.items()}
    usual = float(np.median(list(own.values()))) if own else 0.0
    found: dict[int, tuple[tuple[int, int], ...]] = {}
    for rater, (at, counts) in minutes.items():
        too_many = max(float(settings.burst_votes_per_minute), settings.burst_ratio * min(own[rater], usual))
        days, per_day = np.unique(evidence.received[rater] // DAY, return_counts=True)
        intervals = [*_intervals(days[per_day > settings.burst_votes_per_day], DAY)]
        intervals += _intervals(at[counts > too_many], MINUTE)
        if intervals:
            found[rater] = tuple(_merged(intervals))
    return found


def _intervals(starts: Ints, length: int) -> list[tuple[int, int]]:
    return [(int(start) * length, (int(start) + 1) * length) for start in starts]


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
