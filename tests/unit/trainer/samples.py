"""Samples of random tokens for the trainer's tests."""

from __future__ import annotations

import random

import uuid_utils

from trainer.buffer import Sample


def make_sample(
    rng: random.Random, *, prompt: int = 8, chosen: int = 6, rejected: int = 9, weight: float = 1.0
) -> Sample:
    """A sample with these lengths."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(count))

    return Sample(
        id=str(uuid_utils.uuid7()),
        prompt=tokens(prompt),
        chosen=tokens(chosen),
        rejected=tokens(rejected),
        weight=weight,
        received_at=0.0,
    )


def make_samples(count: int) -> list[Sample]:
    """Samples of different lengths; every call gives the same but for their ids."""
    rng = random.Random(0)
    return [
        make_sample(rng, prompt=rng.randint(1, 20), chosen=rng.randint(1, 20), rejected=rng.randint(1, 20))
        for _ in range(count)
    ]
