"""What a piece of feedback judges, and which way: what later writes of the same user on the same thing replace."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from services.collector.curation import Choice
from services.collector.identity import item_of, outcome_of
from services.collector.submission import Submission
from thumbwheel.v1.preference_pb2 import Preference, ThumbValue

_PREFERENCES = {
    Preference.PREFERENCE_A: Choice.A,
    Preference.PREFERENCE_B: Choice.B,
    Preference.PREFERENCE_TIE: Choice.TIE,
    Preference.PREFERENCE_BOTH_BAD: Choice.BOTH_BAD,
}


class Judgement(NamedTuple):
    """What is judged, and how."""

    item: bytes
    """Of one user's judgements of an item, the last one stands."""

    choice: Choice
    outcome: bytes
    """The same judgement of the same item has the same outcome, whichever response was shown first."""

    edit_sha256: bytes | None = None
    """Of the text that a user wrote."""


def judgement_of(submission: Submission) -> Judgement | None:
    """The judgement in a submission; None for comments and implicit signals, which only add up."""
    body, kind = submission.feedback, submission.kind
    item = item_of(kind, [claims.generation_id for claims in submission.claims])
    match kind:
        case "comparison":
            choice = _PREFERENCES[body.comparison.preference]
            winner = {Choice.A: 0, Choice.B: 1}.get(choice)
            told = choice.value if winner is None else submission.claims[winner].generation_id
            return Judgement(item, choice, outcome_of(item, told.encode()))
        case "thumb":
            choice = Choice.UP if body.thumb.value == ThumbValue.THUMB_VALUE_UP else Choice.DOWN
            return Judgement(item, choice, outcome_of(item, choice.value.encode()))
        case "edit":
            digest = hashlib.sha256(body.edit.text.encode()).digest()
            return Judgement(item, Choice.A, outcome_of(item, digest), digest)
        case _:
            return None
