"""Real preference pairs for the reward model's benchmarks: read, in tokens, and split by hash."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from thumbwheel import errors
from trainer import base, dataset
from trainer.encode import RecordEncoder
from trainer.samples import Pair

HELDOUT = 300
MAX_LENGTH = 512


@dataclass(frozen=True)
class Data:
    """Pairs to learn from and pairs held out, and the base model whose tokens they are in."""

    base: Path
    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]


def path_given() -> Path:
    """The file that `DATA` names. Ends the process where none does."""
    if not (given := os.environ.get("DATA")):
        raise SystemExit("bench: name a file of pairs, such as HH-RLHF: make bench-reward-model DATA=pairs.jsonl.gz")
    return Path(given)


def load(path: Path, pairs: int) -> Data:
    """The first so many pairs to learn from, or all of them with 0; and those held out, always the same ones."""
    from transformers import AutoTokenizer

    folder = base.fetch(None, progress=sys.stderr.isatty())
    encoder = RecordEncoder(AutoTokenizer.from_pretrained(str(folder)), 1 << 31, max_length=MAX_LENGTH)
    refused: list[errors.InvalidArgument] = []
    found = []
    for record in dataset.read(path, unusable=refused.append):
        try:
            sample = encoder.sample(record)
        except errors.InvalidArgument as error:
            refused.append(error)
            continue
        if isinstance(sample, Pair):
            found.append(sample)
    if refused:
        print(f"{len(refused)} lines are not used, such as {refused[0]}", file=sys.stderr)
    found.sort(key=lambda pair: hashlib.sha256(repr((pair.prompt, pair.chosen, pair.rejected)).encode()).digest())
    if len(found) <= HELDOUT:
        raise SystemExit(f"bench: {path} has {len(found)} pairs, and {HELDOUT} are held out: name a larger file.")
    return Data(folder, tuple(found[HELDOUT:][: pairs or None]), tuple(found[:HELDOUT]))
