"""A preference as every format has it: turns, and one or two responses. What cannot be one says why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, cast

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")


class RowError(ValueError):
    """A row that cannot be used; the text says why, and quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Paired:
    """Two responses to one prompt, the better one first."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One response, and whether it is good."""

    prompt: tuple[Turn, ...]
    completion: str
    label: bool


Row: TypeAlias = Paired | Unpaired
Fields: TypeAlias = dict[str, object]


def digest(value: Row | Sequence[Turn]) -> bytes:
    """SHA-256 of a row, or of a prompt, whatever format it came in: 32 bytes."""
    content = asdict(value) if isinstance(value, Paired | Unpaired) else [asdict(turn) for turn in value]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).digest()


def text_field(fields: Mapping[str, object], name: str) -> str:
    """A field that must be text. Raises `RowError`."""
    value = fields.get(name)
    if value is None:
        raise RowError(f"{name}: is missing")
    if not isinstance(value, str):
        raise RowError(f"{name}: is {type(value).__name__}, not text")
    return checked_text(value, name)


def checked_text(value: str, name: str) -> str:
    """Text that can be stored. Raises `RowError` for lone surrogates, which no encoding has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name}: is not valid Unicode") from None
    return value


def turns_field(fields: Mapping[str, object], name: str) -> tuple[Turn, ...]:
    """A field that must be a list of messages with role and content. Raises `RowError`."""
    value = fields.get(name)
    if value is None:
        raise RowError(f"{name}: is missing")
    if not isinstance(value, list):
        raise RowError(f"{name}: is {type(value).__name__}, not a list of messages")
    turns = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError(f"{where}: is no message with role and content")
        if message.get("role") not in ROLES:
            raise RowError(f"{where}.role: is none of {', '.join(ROLES)}")
        turns.append(Turn(cast(Role, message["role"]), checked_text(message["content"], f"{where}.content")))
    return checked_prompt(tuple(turns), name) if name == "prompt" else tuple(turns)


def checked_prompt(turns: tuple[Turn, ...], name: str = "prompt") -> tuple[Turn, ...]:
    """A prompt that a model can be asked. Raises `RowError`."""
    if not turns:
        raise RowError(f"{name}: is empty")
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise RowError(f"{name}[{index}].role: is system, which only the first may be")
        if not turn.content.strip():
            raise RowError(f"{name}[{index}].content: is empty")
    if all(turn.role == "system" for turn in turns):
        raise RowError(f"{name}: asks nothing")
    return turns


def reply_field(fields: Mapping[str, object], name: str) -> str:
    """A field that must be a list of one message of the assistant. Raises `RowError`."""
    turns = turns_field(fields, name)
    if [turn.role for turn in turns] != ["assistant"]:
        raise RowError(f"{name}: is not one message of the assistant")
    return turns[0].content


def split_shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> Paired:
    """Two whole conversations that differ in their last reply only, as a pair. Raises `RowError`."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{name}: does not end with the assistant's reply")
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise RowError("chosen and rejected do not share every turn but the last")
    return Paired(checked_prompt(tuple(chosen[:-1])), chosen[-1].content, rejected[-1].content)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns as every chat template takes them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
