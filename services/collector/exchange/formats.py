"""The formats, one entry each. `detect` finds the one that a row is of.

trl            {"prompt": "…", "chosen": "…", "rejected": "…"}                   TRL preference
trl-unpaired   {"prompt": "…", "completion": "…", "label": true}                TRL unpaired preference
trl-chat       {"prompt": [messages], "chosen": [reply], "rejected": [reply]}   TRL conversational preference
hh             {"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}       HH-RLHF
openrlhf       {"chosen": [messages, reply], "rejected": [messages, reply]}     OpenRLHF, with its chat template on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.collector.exchange import transcript
from services.collector.exchange.rows import (
    Fields,
    Paired,
    Row,
    RowError,
    Turn,
    Unpaired,
    checked_prompt,
    messages,
    reply_field,
    split_shared,
    text_field,
    turns_field,
)

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Format:
    """How a row is read and written."""

    paired: bool
    """Whether its rows hold two responses."""

    parse: Callable[[Mapping[str, object]], Row]
    """Fields to a row. Raises `RowError`."""

    render: Callable[[Row], Fields]
    """A row to fields, which `parse` would read as the same row. Raises `RowError`."""


def detect(fields: Mapping[str, object]) -> str:
    """The name of the format that a row is of. Raises `RowError` where it is of none."""
    prompt, chosen = fields.get("prompt"), fields.get("chosen")
    if "completion" in fields or "label" in fields:
        return "trl-unpaired"
    if isinstance(chosen, list):
        return "openrlhf" if prompt is None else "trl-chat"
    if isinstance(chosen, str) and prompt is None and transcript.is_transcript(chosen):
        return "hh"
    if isinstance(chosen, str) and isinstance(prompt, str):
        return "trl"
    raise RowError(f"is of no known format: it has the fields {', '.join(sorted(fields)[:8]) or 'none'}")


def _prompt(fields: Mapping[str, object]) -> tuple[Turn, ...]:
    if isinstance(fields.get("prompt"), list):
        return turns_field(fields, "prompt")
    return checked_prompt(transcript.parse_prompt(text_field(fields, "prompt")))


def _parse_trl(fields: Mapping[str, object]) -> Row:
    return Paired(_prompt(fields), text_field(fields, "chosen"), text_field(fields, "rejected"))


def _render_trl(row: Row) -> Fields:
    assert isinstance(row, Paired)
    return {"prompt": transcript.render_prompt(row.prompt), "chosen": row.chosen, "rejected": row.rejected}


def _parse_unpaired(fields: Mapping[str, object]) -> Row:
    label = fields.get("label")
    if not isinstance(label, bool):
        raise RowError("label: is neither true nor false")
    chat = isinstance(fields.get("completion"), list)
    return Unpaired(_prompt(fields), (reply_field if chat else text_field)(fields, "completion"), label)


def _render_unpaired(row: Row) -> Fields:
    assert isinstance(row, Unpaired)
    return {"prompt": transcript.render_prompt(row.prompt), "completion": row.completion, "label": row.label}


def _parse_chat(fields: Mapping[str, object]) -> Row:
    if fields.get("prompt") is None:
        return split_shared(turns_field(fields, "chosen"), turns_field(fields, "rejected"))
    return Paired(_prompt(fields), reply_field(fields, "chosen"), reply_field(fields, "rejected"))


def _render_chat(row: Row) -> Fields:
    assert isinstance(row, Paired)
    chosen, rejected = (messages([Turn("assistant", text)]) for text in (row.chosen, row.rejected))
    return {"prompt": messages(row.prompt), "chosen": chosen, "rejected": rejected}


def _render_whole(row: Row) -> Fields:
    assert isinstance(row, Paired)
    chosen, rejected = (messages([*row.prompt, Turn("assistant", text)]) for text in (row.chosen, row.rejected))
    return {"chosen": chosen, "rejected": rejected}


def _parse_hh(fields: Mapping[str, object]) -> Row:
    chosen, rejected = (transcript.parse(text_field(fields, name), name) for name in ("chosen", "rejected"))
    return split_shared(chosen, rejected)


def _render_hh(row: Row) -> Fields:
    assert isinstance(row, Paired)
    chosen, rejected = (
        transcript.render([*row.prompt, Turn("assistant", text)]) for text in (row.chosen, row.rejected)
    )
    return {"chosen": chosen, "rejected": rejected}


FORMATS: dict[str, Format] = {
    "trl": Format(True, _parse_trl, _render_trl),
    "trl-unpaired": Format(False, _parse_unpaired, _render_unpaired),
    "trl-chat": Format(True, _parse_chat, _render_chat),
    "hh": Format(True, _parse_hh, _render_hh),
    "openrlhf": Format(True, _parse_chat, _render_whole),
}
