"""What keeps a round from being published: signs that the policy went wrong, each with what to do about it.

    not finite        a loss or a gradient is no number (found by the learner)
    kl                mean log π/π₀ of a response, in nats, beyond the bound
    entropy           −log π a token, mean, below a share of what it was at first: the policy says one thing only
    repetition        share of 4-grams that a response has said before, beyond the bound
    length            mean tokens of a response, beyond a multiple of what they were at first
    feedback loop     distinct bigrams among all responses fell below a share of what they were, while their reward rose

They look at what the policy itself wrote, as it comes with the round's samples, so they cost nothing. "At first" is the
first round that a task learnt from such samples; it is kept in training checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from thumbwheel import errors
from trainer.samples import Demonstration, Group, Sample, Tokens

if TYPE_CHECKING:
    from trainer.config import TrainerSettings

_N = 4
_COMPARED = 32
_LEAST_RESPONSES = 8
"""With fewer responses, their means say little."""
REASONS = ("not_finite", "kl", "entropy", "repetition", "length", "feedback_loop")


class Unfit(errors.Internal):
    """What was learnt is not to be published. `reason` is one of `REASONS`."""

    def __init__(self, message: str, *, reason: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason


def vitals(samples: Sequence[Sample], measured: Mapping[str, float]) -> dict[str, float]:
    """What the guards look at, as far as a round tells it: of the policy's own responses in `samples`, and of what the
    objective `measured`.
    """
    found: dict[str, float] = {}
    written = [
        response
        for sample in samples
        if sample.versions and not isinstance(sample, Demonstration)
        for response in sample.responses
    ]
    if len(written) >= _LEAST_RESPONSES:
        found["response_tokens"] = sum(map(len, written)) / len(written)
        found["repetition"] = sum(map(repetition, written)) / len(written)
        found["diversity"] = diversity(written)
    for name in ("kl", "entropy"):
        # In a mixture each objective measures its own; the greatest KL and the least entropy are what matters.
        values = [value for key, value in measured.items() if key == name or key.endswith(f"_{name}")]
        if values:
            found[name] = max(values) if name == "kl" else min(values)
    rewards = [rollout.reward for sample in samples if isinstance(sample, Group) for rollout in sample.rollouts]
    if rewards:
        found["reward"] = sum(rewards) / len(rewards)
    return found


def repetition(tokens: Tokens) -> float:
    """Share of a response's 4-grams that it has had before; 0 for one of fewer than five tokens."""
    grams = [tokens[i : i + _N] for i in range(len(tokens) - _N + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def diversity(responses: Sequence[Tokens]) -> float:
    """Distinct bigrams of all responses, over all bigrams (Li et al., 2016, arXiv 1510.03055); 1 where there are none.

    Only the first 32 tokens of each response count, so that long responses are not less diverse for it.
    """
    grams = [pair for response in responses for pair in itertools.pairwise(response[:_COMPARED])]
    return len(set(grams)) / len(grams) if grams else 1.0


def check(now: Mapping[str, float], first: Mapping[str, float], settings: TrainerSettings) -> None:
    """Raises `Unfit` where a vital sign is out of bounds. A bound of 0 is none."""
    raising = [
        ("kl", settings.max_kl, "KL to the reference, in nats a response", "--max-kl"),
        ("repetition", settings.max_repetition, "share of repeated 4-grams", "--max-repetition"),
    ]
    for name, bound, what, flag in raising:
        if bound and now.get(name, 0.0) > bound:
            raise _unfit(name, f"The {what} is {now[name]:.3g}, more than {bound:g}", flag)
    length, at_first = now.get("response_tokens", 0.0), first.get("response_tokens", 0.0)
    if settings.max_length_growth and at_first and length > settings.max_length_growth * at_first:
        what = f"Responses have {length:.0f} tokens, {length / at_first:.1f} times as many as at first"
        raise _unfit("length", what, "--max-length-growth")
    if (share := _share("entropy", now, first)) is not None and share < settings.min_entropy_share:
        what = f"The entropy is {now['entropy']:.3g} nats a token, {share:.0%} of what it was at first"
        raise _unfit("entropy", what, "--min-entropy-share")
    share = _share("diversity", now, first)
    rose = "reward" in first and now.get("reward", first["reward"]) > first["reward"]
    if share is not None and rose and share < settings.min_diversity_share:
        what = (
            f"Responses have {share:.0%} of the distinct bigrams that they had at first, while their reward rose from "
            f"{first['reward']:.3g} to {now['reward']:.3g}: a feedback loop"
        )
        raise _unfit("feedback_loop", what, "--min-diversity-share")


def _share(name: str, now: Mapping[str, float], first: Mapping[str, float]) -> float | None:
    return now[name] / first[name] if name in now and first.get(name, 0.0) > 0 else None


def _unfit(reason: str, what: str, flag: str) -> Unfit:
    return Unfit(
        f"{what}: this round is not published, and the last version stays as it is.",
        reason=reason,
        remedy=f"Look at what it learns from; lower the learning rate, or set {flag}, and start the trainer again.",
    )
