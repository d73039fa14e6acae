"""Pairs out of a file, for a reward model: in tokens, and divided into those to learn from and those held out."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thumbwheel import errors
from trainer import dataset, runtime
from trainer.encode import RecordEncoder
from trainer.samples import Pair

logger = logging.getLogger(__name__)


def read(path: Path, encoder: RecordEncoder, *, limit: int = 0, stop: Callable[[], bool] = lambda: False) -> list[Pair]:
    """The pairs in the first `limit` lines of a file, or in all. A pair without an id has one that follows from its
    content, so that it is known again in another file. Lines that cannot be used are counted, and the first is told.

    Raises `errors.NotFound`, and `errors.InvalidArgument` where no line can be used.
    """
    refused: list[errors.InvalidArgument] = []
    found: dict[str, Pair] = {}
    for record in dataset.read(path, limit=limit, unusable=refused.append):
        if stop():
            raise runtime.Stopped
        if record.kind is not Pair:
            refused.append(record.error("chosen", "is missing: it is no pair."))
            continue
        if "id" not in record.fields:
            record.fields["id"] = _id(record.fields)  # type: ignore[index]  # it is the line's own dictionary
        try:
            sample = encoder.sample(record)
        except errors.InvalidArgument as error:
            refused.append(error)
            continue
        assert isinstance(sample, Pair)
        found.setdefault(sample.id, sample)
    if not found:
        raise refused[0]
    if refused:
        print(f"{len(refused)} lines are passed over, such as {refused[0]}", file=sys.stderr)
    return list(found.values())


def split(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Those to learn from, and those held out: about this share of the prompts, the same ones every time.

    Raises `errors.FailedPrecondition` where either would be empty.
    """
    parts: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        parts[held_out(pair, share)].append(pair)
    if not all(parts):
        raise errors.FailedPrecondition(
            f"{len(pairs)} pairs are too few to hold some out.", remedy="Collect more, or raise --heldout-share."
        )
    return parts


def held_out(pair: Pair, share: float) -> bool:
    """Whether a pair is among this share of the prompts."""
    digest = hashlib.sha256(repr(pair.prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _id(fields: Any) -> str:
    content = [fields.get(name) for name in ("prompt", "chosen", "rejected")]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
