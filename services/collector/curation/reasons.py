"""Why feedback stands where it stands: every reason code that curation gives, each with a line that explains it."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A reason code; `explanation` says it in words."""

    explanation: str

    def __new__(cls, code: str, explanation: str) -> Reason:
        """A code that carries its explanation."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.explanation = explanation
        return member

    PREFERRED = "preferred", "A comparison to learn from."
    PAIRED_THUMBS = "paired_thumbs", "With a thumb of opposite sign on the same prompt, a comparison to learn from."
    UNPAIRED_THUMB = "unpaired_thumb", "A thumb for which no thumb of opposite sign was found: emitted by itself."
    GOLD = "gold", "A control question, whose answer was known: it judges the rater and is not learnt from."

    TIE = "tie", "The two were found equally good."
    BOTH_BAD = "both_bad", "Neither was found acceptable."
    SUPERSEDED = "superseded", "The same rater judged the same item again later; the last judgement counts."
    SAME_TEXT = "same_text", "The two responses have the same text."
    EMPTY = "empty", "A response holds no text."
    CUT = "cut", "The response that won was cut off at its greatest length: it may lose, but is no example to follow."
    CONTESTED = "contested", "As much weight judges the pair one way as the other."
    OUTVOTED = "outvoted", "More weight judges the pair the other way."
    CYCLE = "cycle", "With other judgements on the prompt it forms a cycle: A over B over C over A."
    OVER_GROUP_CAP = "over_group_cap", "The prompt, its duplicates included, has as many comparisons as may count."
    OVER_USER_CAP = "over_user_cap", "The user has given as much as one user may in a day, or of the whole."
    OVER_TENANT_CAP = "over_tenant_cap", "The tenant has given as much as one tenant may in a day."

    QUARANTINED_MANUALLY = "quarantined_manually", "An operator quarantined the rater."
    QUARANTINED_BURST = "quarantined_burst", "The rater judged faster than people judge."
    QUARANTINED_COLLUSION = "quarantined_collusion", "A group of accounts votes as one, or for one side, beyond chance."
    QUARANTINED_UNRELIABLE = (
        "quarantined_unreliable",
        "The rater agrees with others and with control questions no more than chance does.",
    )
