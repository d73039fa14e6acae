"""Conversations as one text, as HH-RLHF has them, here as messages."""

from __future__ import annotations

import re
from typing import Any

from thumbwheel import errors

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    """Whether something begins as one."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def messages(text: str, field: str) -> list[dict[str, str]]:
    """The turns of a transcript. Raises `errors.InvalidArgument` naming `field` where the last is not a reply."""
    _, *parts = _MARKER.split(text)
    turns = [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise errors.InvalidArgument("does not end with a turn of the assistant.", field=field)
    return turns


def split_pair(chosen: str, rejected: str, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompt and last replies, as messages, of two transcripts. Raises `errors.InvalidArgument` where they do not share
    every turn but the last.
    """
    first, second = messages(chosen, f"{where}: chosen"), messages(rejected, f"{where}: rejected")
    if first[:-1] != second[:-1]:
        raise errors.InvalidArgument("and chosen do not share every turn but the last.", field=f"{where}: rejected")
    return first[:-1], first[-1:], second[-1:]
