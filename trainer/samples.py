"""What there is to learn from, in tokens: a prompt, responses to it, and what is known of them.

    Pair            one response is better than the other          dpo and its family, reward
    Thumb           a response that was liked, or was not          kto
    Demonstration   a response as it should be (edits are such)    sft
    Group           responses of the policy with their rewards     ppo, grpo, rloo

A sample's weight counts in its loss; its id is that of the event that it came from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    id: str
    """The event's id."""

    prompt: Tokens
    """Token ids of the prompt, left-truncated where it was too long."""

    weight: float = 1.0
    """Weight in the loss."""

    received_at: float = 0.0
    """When the last of its votes was committed, in seconds since the epoch."""

    versions: tuple[str, ...] = ()
    """The policy versions that wrote the responses; none where people did."""

    traceparent: str = ""
    """The trace of the call that its last vote came with; empty where it was not traced."""

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """Its responses, in the order of its fields."""
        raise NotImplementedError

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and all responses."""
        return len(self.prompt) + self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(_Sample):
    """A comparison."""

    chosen: Tokens
    """Token ids of the better response."""

    rejected: Tokens
    """Token ids of the worse response."""

    tie: bool = False
    """Whether neither was better; then the order says nothing."""

    margin: float = 0.0
    """How much better, in units of the score; a reward model is to keep the two so far apart."""

    aspects: tuple[tuple[str, int], ...] = ()
    """Verdicts in single respects: 1 for chosen, -1 for rejected, 0 for a tie."""

    source: str = ""
    """Where it came from, such as `vote` or a file's name for it."""

    writers: tuple[str, str] = ("", "")
    """The policy versions that wrote chosen and rejected; empty where a person did, or more than one version."""

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """Chosen and rejected."""
        return self.chosen, self.rejected

    @property
    def longer(self) -> int:
        """By how many tokens chosen is the longer one."""
        return len(self.chosen) - len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumb(_Sample):
    """A response that somebody liked, or did not."""

    response: Tokens
    """Token ids of the response."""

    liked: bool
    """Thumb up or down."""

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """The response."""
        return (self.response,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration(_Sample):
    """A response as it should be."""

    response: Tokens
    """Token ids of the response."""

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """The response."""
        return (self.response,)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response of the policy, and what it earned."""

    tokens: Tokens
    """Token ids of the response."""

    reward: float
    """Score of the whole response."""

    logprobs: tuple[float, ...] = ()
    """Log-probability of every token when it was served; none where that was not recorded."""

    finished: bool = True
    """Whether it ended by itself; otherwise it was cut at the length limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(_Sample):
    """Rollouts of one prompt."""

    rollouts: tuple[Rollout, ...]
    """At least one; at least two where rewards are compared within the group."""

    reference_reward: float | None = None
    """Score of one response of the reference model to this prompt: the reward's baseline. None where there is none."""

    reward_version: str = ""
    """The reward version that scored all of it; none where no reward service did."""

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """Those of the rollouts."""
        return tuple(rollout.tokens for rollout in self.rollouts)


Sample: TypeAlias = Pair | Thumb | Demonstration | Group
Kind: TypeAlias = type[Pair] | type[Thumb] | type[Demonstration] | type[Group]

KINDS: dict[str, Kind] = {"pair": Pair, "thumb": Thumb, "demonstration": Demonstration, "group": Group}
"""By the name they are saved under."""


def kind_name(kind: Kind) -> str:
    """The name of a kind, as in `KINDS`."""
    return kind.__name__.lower()


def to_fields(sample: Sample) -> dict[str, Any]:
    """A sample as JSON can hold it."""
    return {"kind": kind_name(type(sample))} | dataclasses.asdict(sample)


def from_fields(fields: dict[str, Any]) -> Sample:
    """Reads `to_fields`. Raises KeyError, TypeError or ValueError for anything else."""
    fields = dict(fields)
    kind = KINDS[fields.pop("kind", "pair")]  # the first release knew pairs alone
    if kind is Pair:
        fields["aspects"] = tuple(map(tuple, fields.get("aspects", ())))
    if kind is Group:
        fields["rollouts"] = tuple(Rollout(**_tuples(rollout)) for rollout in fields["rollouts"])
    return kind(**_tuples(fields))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
