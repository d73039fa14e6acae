"""What curation reads and what it says: votes in, a decision on each out. Texts are known by their hashes alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from services.collector.curation.reasons import Reason


class Choice(StrEnum):
    """What a vote says. A comparison and an edit take the first four, a thumb the last two."""

    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    UP = "up"
    DOWN = "down"


class RaterId(NamedTuple):
    """Who voted. User ids are a tenant's own: the same one at two tenants is two raters."""

    tenant: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response that was judged. For the text that a user wrote in an edit, the generation id is the feedback's."""

    generation_id: str
    sha256: bytes
    """SHA-256 of the text in UTF-8. Responses of one text are one node of the prompt's graph."""

    empty: bool = False
    """The text holds nothing visible."""

    cut: bool = False
    """It ended because it reached its greatest length."""

    version: str = ""
    """The policy version that produced its last token; empty for an edit, or where it is not known."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A comparison, a thumb or an edit, joined to its generations. Comments and implicit signals do not come here.

    An edit is a comparison in which the user's text, `a`, is preferred.
    """

    feedback_id: str
    rater: RaterId
    prompt_id: str
    choice: Choice
    a: Response
    """The response shown first; a thumb's only one; an edit's new text."""

    received_at: int
    """When it was committed, in microseconds since the epoch."""

    b: Response | None = None
    """The response shown second; an edit's original; None for a thumb."""

    prompt_sha256: bytes = b""
    """SHA-256 of the prompt as the model saw it. Thumbs are paired only where it is the same."""

    edit: bool = False
    """`a` is the user's own text in place of `b`."""

    gold: Choice | None = None
    """The known answer, where this is a control question."""

    user_rank: int = 0
    """How much feedback the rater had given before it on that UTC day, what was superseded or retracted included:
    given once at receipt and never changed, so that a cap never changes its mind."""

    tenant_rank: int = 0
    """The same over all raters of the tenant."""

    @property
    def order(self) -> tuple[int, str]:
        """The order of writing: the last of a rater on an item wins."""
        return self.received_at, self.feedback_id


class State(StrEnum):
    """Where feedback stands after curation: names of FeedbackState, without their prefix."""

    ACCEPTED = "ACCEPTED"
    APART = "APART"
    QUARANTINED = "QUARANTINED"
    RECORDED = "RECORDED"


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one vote."""

    feedback_id: str
    state: State
    reason: Reason
    weight: float = 0.0
    """Weight in the loss, above 0 to 1 in thousandths, of what is emitted, paired thumbs included; else 0."""

    chosen: str = ""
    """Generation id of the better response, where it is accepted; of a tie that is emitted, the one shown first."""

    rejected: str = ""
    """Generation id of the worse response, where it is accepted; of a tie that is emitted, the other one."""

    partner: str = ""
    """For paired thumbs: the feedback id of the other thumb."""

    emits: bool = False
    """The comparison is emitted for this one. Of two paired thumbs only the upward one emits; it names both."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """What operators decided by hand. It wins over what was detected; a release wins over a quarantine."""

    quarantined: frozenset[RaterId] = frozenset()
    """Raters whose feedback is quarantined."""

    released: frozenset[RaterId] = frozenset()
    """Raters who are never quarantined. Their caps and their weight stay."""

    released_feedback: frozenset[str] = frozenset()
    """Feedback ids that are not quarantined, whoever gave them."""
