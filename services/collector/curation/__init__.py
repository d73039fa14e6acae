"""Curation: which votes are learnt from, with which weight, and why the others are not.

    votes ─▶ assess ─▶ Raters: weight, quarantine and bursts of every rater       now and then, over all votes
                          │
    votes of one group ─▶ curate ─▶ a Decision on each of them                    at each vote, over its group
       (PromptGroups)

All of it is pure: no I/O, no clock, no chance. `curate` waits for nothing: whom the snapshot does not know is a
newcomer. After a new snapshot, the groups with votes of raters whose standing changed are curated again. `curate_all`
does everything over all votes, for replay.
"""

from services.collector.curation.duplicates import PromptGroups
from services.collector.curation.prompt import curate
from services.collector.curation.raters import Rater, Raters, assess
from services.collector.curation.reasons import Reason
from services.collector.curation.replay import Result, curate_all
from services.collector.curation.settings import CurationSettings
from services.collector.curation.votes import Choice, Decision, Overrides, RaterId, Response, State, Vote

__all__ = [
    "Choice",
    "CurationSettings",
    "Decision",
    "Overrides",
    "PromptGroups",
    "Rater",
    "RaterId",
    "Raters",
    "Reason",
    "Response",
    "Result",
    "State",
    "Vote",
    "assess",
    "curate",
    "curate_all",
]
