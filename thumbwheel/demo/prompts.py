"""Questions that simulated users ask: everyday ones, written for this project, in `prompts.jsonl` beside this file.

Each line is one question with its topic and its split. Users ask the ones of `train`; versions are measured on those of
`held_out`, which nobody trains on. Every topic gives 20 to the one and 6 to the other, drawn once and written down.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class DemoPrompt:
    """One question."""

    split: Split
    topic: str
    prompt: str


@functools.cache
def all_prompts() -> tuple[DemoPrompt, ...]:
    """All questions, in the order of the file."""
    text = resources.files("thumbwheel.demo").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return tuple(DemoPrompt(**json.loads(line)) for line in text.splitlines())


def train_prompts() -> list[str]:
    """Questions whose answers users compare, and the model learns from."""
    return [one.prompt for one in all_prompts() if one.split == "train"]


def held_out_prompts(count: int = 96) -> list[str]:
    """Questions that are only ever used to measure: all of them, or fewer, of as many topics as can be."""
    found = [one.prompt for one in all_prompts() if one.split == "held_out"]
    return [found[number * len(found) // count] for number in range(count)]
