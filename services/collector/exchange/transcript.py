"""Conversations as one text, the way of HH-RLHF: "\\n\\nHuman: …\\n\\nAssistant: …"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.collector.exchange.rows import Role, RowError, Turn

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_NAMES: dict[Role, str] = {"user": "Human", "assistant": "Assistant"}
_ROLES: dict[str, Role] = {name: role for role, name in _NAMES.items()}
_CUE = "\n\nAssistant:"


def is_transcript(text: str) -> bool:
    """Whether a text begins as one."""
    return text.startswith("\n\nHuman:")


def parse(text: str, name: str) -> list[Turn]:
    """The turns of a transcript. Raises `RowError`, with the field's `name`."""
    if not is_transcript(text):
        raise RowError(f"{name}: does not begin with a turn of the human")
    _, *parts = _MARKER.split(text)
    return [Turn(_ROLES[who], said.removeprefix(" ")) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def render(turns: Sequence[Turn]) -> str:
    """Reverses `parse`. Raises `RowError` for turns that would not come back as they are."""
    text = ""
    for turn in turns:
        if turn.role == "system":
            raise RowError("a transcript has no turn of the system")
        text += f"\n\n{_NAMES[turn.role]}: {turn.content}"
    if parse(text, "transcript") != list(turns):
        raise RowError("a turn holds what marks the beginning of a turn")
    return text


def parse_prompt(text: str) -> tuple[Turn, ...]:
    """The turns of a prompt that is given as one text: a transcript, or what a user says."""
    if not is_transcript(text):
        return (Turn("user", text),)
    return tuple(parse(text.removesuffix(_CUE), "prompt"))


def render_prompt(turns: Sequence[Turn]) -> str:
    """Reverses `parse_prompt`. Raises `RowError` for turns that would not come back as they are."""
    alone = len(turns) == 1 and turns[0].role == "user" and not is_transcript(turns[0].content)
    text = turns[0].content if alone else render(turns) + _CUE
    if parse_prompt(text) != tuple(turns):
        raise RowError("a turn holds what marks the beginning of a turn")
    return text
