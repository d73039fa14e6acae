"""Whether feedback may teach, once the generations that it is about are known. No I/O.

comparison, thumb, edit   → to curation, which decides what is learnt from
comment, implicit signal  → RECORDED: told to whoever watches, and kept apart as weak evidence
a response that is not what its receipt attests, or no consent → APART
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from services.collector.submission import Submission
from thumbwheel.v1.policy_pb2 import ReceiptClaims
from thumbwheel.v1.preference_pb2 import FeedbackState

MISMATCH = "receipt_mismatch"
NO_CONSENT = "no_consent"
AWAITING = "awaiting_generation"
REASONS = {"comment": "comment", "implicit": "weak_evidence"}


class Arrived(NamedTuple):
    """What the record knows of a generation."""

    generation_id: str
    tenant: str
    prompt_id: str
    text_sha256: bytes
    consent: bool
    prompt_sha256: bytes | None = None
    empty: bool = False
    cut: bool = False
    version: str = ""
    event: bytes = b""
    """The GenerationEvent."""


class Joined(NamedTuple):
    """Where feedback stands before curation. `teaches` is true where curation goes on from here."""

    state: FeedbackState.ValueType
    reason: str = ""
    teaches: bool = False


def join(submission: Submission, arrived: Mapping[str, Arrived]) -> Joined | None:
    """Where the feedback stands, by generations by id; None where one of its generations has not arrived."""
    for claims in submission.claims:
        if claims.generation_id not in arrived:
            return None
        if not _attested(claims, arrived[claims.generation_id]):
            return Joined(FeedbackState.FEEDBACK_STATE_APART, MISMATCH)
    if not submission.consent or not all(arrived[claims.generation_id].consent for claims in submission.claims):
        return Joined(FeedbackState.FEEDBACK_STATE_APART, NO_CONSENT)
    reason = REASONS.get(submission.kind)
    return Joined(FeedbackState.FEEDBACK_STATE_RECORDED, reason or "", teaches=reason is None)


def _attested(claims: ReceiptClaims, arrived: Arrived) -> bool:
    return (arrived.tenant, arrived.prompt_id, arrived.text_sha256) == (
        claims.tenant,
        claims.prompt_id,
        claims.response_sha256,
    )
