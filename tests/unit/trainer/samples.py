"""Samples of random tokens for the trainer's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import uuid_utils

from trainer.samples import Demonstration, Group, Pair, Rollout, Sample, Thumb


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    """So many token ids."""
    return tuple(rng.randrange(3, 250) for _ in range(count))


def make_sample(
    rng: random.Random, *, prompt: int = 8, chosen: int = 6, rejected: int = 9, weight: float = 1.0
) -> Pair:
    """A sample with these lengths."""

    return Pair(
        id=str(uuid_utils.uuid7()),
        prompt=tokens(rng, prompt),
        chosen=tokens(rng, chosen),
        rejected=tokens(rng, rejected),
        weight=weight,
        received_at=0.0,
    )


def make_samples(count: int) -> list[Pair]:
    """Samples of different lengths; every call gives the same but for their ids."""
    rng = random.Random(0)
    return [
        make_sample(rng, prompt=rng.randint(1, 20), chosen=rng.randint(1, 20), rejected=rng.randint(1, 20))
        for _ in range(count)
    ]


def make_thumbs(count: int) -> list[Thumb]:
    """Thumbs of different lengths, every third of them down."""
    rng = random.Random(1)
    return [
        Thumb(
            id=f"thumb-{index:03d}",
            prompt=tokens(rng, rng.randint(1, 20)),
            response=tokens(rng, rng.randint(1, 20)),
            liked=index % 3 != 2,
        )
        for index in range(count)
    ]


def make_demonstrations(count: int) -> list[Demonstration]:
    """Demonstrations of different lengths."""
    rng = random.Random(2)
    return [
        Demonstration(
            id=f"demonstration-{index:03d}",
            prompt=tokens(rng, rng.randint(1, 20)),
            response=tokens(rng, rng.randint(1, 20)),
        )
        for index in range(count)
    ]


def make_groups(count: int, *, rollouts: int = 4, recorded: bool = False) -> list[Group]:
    """Groups of rollouts of different lengths, with rewards of all sizes."""
    rng = random.Random(3)

    def rollout() -> Rollout:
        response = tokens(rng, rng.randint(1, 20))
        logprobs = tuple(-6 * rng.random() for _ in response) if recorded else ()
        return Rollout(response, reward=rng.gauss(0.0, 2.0), logprobs=logprobs)

    return [
        Group(
            id=f"group-{index:03d}",
            prompt=tokens(rng, rng.randint(1, 20)),
            rollouts=tuple(rollout() for _ in range(rollouts)),
        )
        for index in range(count)
    ]


def with_sums(samples: Sequence[Sample], *sums: float) -> dict[str, torch.Tensor]:
    """Log-probabilities of the tokens of samples, such that those of the responses are `sums`."""

    def spread(sample: Sample) -> torch.Tensor:
        return torch.cat(
            [torch.full((len(part),), total / len(part)) for part, total in zip(sample.responses, sums, strict=True)]
        )

    return {sample.id: spread(sample) for sample in samples}
