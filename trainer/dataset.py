"""From a JSONL file to samples: one JSON object a line, in one of these forms.

    {prompt, chosen, rejected}                            a pair; without prompt, it is what both begin with
      and tie, margin, aspects, source                      where they are known
    {prompt, completion, label}                           a thumb; label is true for up
    {prompt, completion}, {messages}                      a demonstration
    {prompt, responses, rewards}                          a group of rollouts
      and logprobs, finished, reference_reward            where they are known

A prompt is text, token ids, or chat messages; a response is text, token ids, or one assistant message. Text is taken as
it is: what a chat model is to see as a chat has to come as messages, or in a pair as a transcript of HH-RLHF.
`id` and `weight` may come with every form. The forms but the last are TRL's. A file may be gzipped. Every error names
file, line and field. Nothing here needs torch.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thumbwheel import errors
from trainer import transcript
from trainer.samples import Demonstration, Group, Kind, Pair, Thumb

Content = str | list[Any]
"""Text, token ids, or messages."""

VERDICTS = {"chosen": 1, "rejected": -1, "tie": 0}
"""What may be said of a pair in a single respect."""

_REMEDY = "See `python -m trainer --data FILE --help` for the forms there are."


@dataclass(frozen=True)
class Record:
    """A line of the file, checked but for what only a tokenizer can tell."""

    where: str
    """File and line, such as `pairs.jsonl:12`."""
    kind: Kind
    prompt: Content
    responses: tuple[Content, ...]
    fields: Mapping[str, Any]
    """The line as it is."""

    def error(self, field: str, message: str, remedy: str = "") -> errors.InvalidArgument:
        """What is wrong with a field of it."""
        return errors.InvalidArgument(message, field=f"{self.where}: {field}", remedy=remedy)


def read(
    path: Path, *, limit: int = 0, unusable: Callable[[errors.InvalidArgument], None] | None = None
) -> list[Record]:
    """The records in the first `limit` lines of a file, or in all; blank lines are passed over, and so are lines that
    cannot be used where `unusable` is there to be told of each.

    Raises `errors.NotFound` and `errors.InvalidArgument`.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        file = opened(path, "rt", encoding="utf-8")
    except OSError as error:
        raise errors.NotFound(f"{path} cannot be read: {error.strerror}.", remedy="Name a JSONL file.") from error
    records: list[Record] = []
    seen: dict[str, str] = {}
    with file:
        for where, line in _lines(path, file):
            if limit and len(records) == limit:
                break
            try:
                record = parse(where, line)
            except errors.InvalidArgument as error:
                if unusable is None:
                    raise
                unusable(error)
                continue
            name = str(record.fields.get("id", where))
            if name in seen:
                raise record.error("id", f"is {name!r}, as in {seen[name]}.", "Give every line an id of its own.")
            seen[name] = where
            records.append(record)
    if not records:
        raise errors.InvalidArgument("holds no line.", field=str(path), remedy=_REMEDY)
    return records


def _lines(path: Path, file: Any) -> Iterator[tuple[str, str]]:
    try:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", line
    except gzip.BadGzipFile as error:
        raise errors.InvalidArgument(
            f"cannot be unpacked: {error}.", field=str(path), remedy="Name another."
        ) from error
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"is no UTF-8: {error}.", field=str(path), remedy="Convert it.") from error


def parse(where: str, line: str) -> Record:
    """A line. Raises `errors.InvalidArgument`."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise errors.InvalidArgument(f"is no JSON: {error}.", field=where, remedy=_REMEDY) from error
    if not isinstance(fields, dict):
        raise errors.InvalidArgument("is no JSON object.", field=where, remedy=_REMEDY)
    kind, prompt, responses = _form(where, fields)
    record = Record(where, kind, prompt, tuple(responses.values()), fields)
    _check_content(record, "prompt", prompt, response=False)
    for name, response in responses.items():
        _check_content(record, name, response, response=True)
    if kind is Pair and record.responses[0] == record.responses[1]:
        raise record.error("rejected", "is the same as chosen: there is nothing to learn.", "Leave the line out.")
    if kind is Thumb and not isinstance(fields["label"], bool):
        raise record.error("label", f"is {fields['label']!r}.", "Use true for a thumb up and false for one down.")
    if kind is Pair:
        _check_pair(record)
    if kind is Group:
        _check_group(record)
    weight = fields.get("weight", 1.0)
    if not _is_number(weight) or weight <= 0:
        raise record.error("weight", f"is {weight!r}.", "Use a positive number, or leave it out.")
    if not isinstance(fields.get("id", ""), str):
        raise record.error("id", f"is {fields['id']!r}.", "Use a string, or leave it out.")
    return record


def _form(where: str, fields: dict[str, Any]) -> tuple[Kind, Any, dict[str, Any]]:
    """What a line is, its prompt, and its responses by the names of their fields."""

    def prompt() -> Any:
        if "prompt" not in fields:
            raise errors.InvalidArgument("is missing.", field=f"{where}: prompt", remedy=_REMEDY)
        return fields["prompt"]

    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise errors.InvalidArgument(
                "is no list of at least two messages.", field=f"{where}: messages", remedy=_REMEDY
            )
        return Demonstration, messages[:-1], {f"messages[{len(messages) - 1}]": messages[-1:]}
    if "responses" in fields or "rewards" in fields:
        responses = fields.get("responses")
        if not isinstance(responses, list) or not responses:
            raise errors.InvalidArgument("is no list of responses.", field=f"{where}: responses", remedy=_REMEDY)
        return Group, prompt(), {f"responses[{index}]": value for index, value in enumerate(responses)}
    if "chosen" in fields or "rejected" in fields:
        for name in ("chosen", "rejected"):
            if name not in fields:
                raise errors.InvalidArgument("is missing.", field=f"{where}: {name}", remedy=_REMEDY)
        if "prompt" in fields:
            return Pair, fields["prompt"], {name: fields[name] for name in ("chosen", "rejected")}
        pair = fields["chosen"], fields["rejected"]
        splitting = transcript.split_pair if all(map(transcript.is_transcript, pair)) else _without_shared
        shared, chosen, rejected = splitting(*pair, where)
        return Pair, shared, {"chosen": chosen, "rejected": rejected}
    if "completion" in fields:
        return Thumb if "label" in fields else Demonstration, prompt(), {"completion": fields["completion"]}
    raise errors.InvalidArgument(
        f"has only {', '.join(sorted(fields)) or 'nothing'}, of which no sample can be made.",
        field=where,
        remedy=_REMEDY,
    )


def _without_shared(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """What two responses begin with, which is their prompt, and what follows; text is divided at a space."""
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise errors.InvalidArgument(
            "and rejected are not of one form, so no prompt can be found in them.",
            field=f"{where}: chosen",
            remedy="Give the prompt as `prompt`.",
        )
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    if isinstance(chosen, str):
        end = chosen.rfind(" ", 0, end) if " " in chosen[:end] else 0
    if not end:
        raise errors.InvalidArgument("is missing.", field=f"{where}: prompt", remedy=_REMEDY)
    return chosen[:end], chosen[end:], rejected[end:]


def _check_content(record: Record, name: str, content: Any, *, response: bool) -> None:
    if isinstance(content, str):
        if not content.strip():
            raise record.error(name, "is empty.", "Leave the line out.")
        return
    if not isinstance(content, list) or not content:
        raise record.error(name, f"is {content!r:.40}, neither text, messages nor token ids.", _REMEDY)
    if all(type(token) is int for token in content):
        if min(content) < 0:
            raise record.error(name, f"has {min(content)}, which is no token id.")
        return
    for index, message in enumerate(content):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise record.error(f"{name}[{index}]", f"is {message!r:.60}, no message.", "Use {role, content}.")
    if response and (len(content) != 1 or content[0]["role"] != "assistant"):
        roles = ", ".join(message["role"] for message in content)
        raise record.error(name, f"has the messages {roles}.", "A response is one message of the assistant.")
    if response and not content[0]["content"].strip():
        raise record.error(name, "is empty.", "Leave the line out.")


def _check_pair(record: Record) -> None:
    fields = record.fields
    if not isinstance(fields.get("tie", False), bool):
        raise record.error("tie", f"is {fields['tie']!r}.", "Use true where neither was better, or leave it out.")
    margin = fields.get("margin", 0.0)
    if not _is_number(margin) or margin < 0:
        raise record.error("margin", f"is {margin!r}.", "Use a number from 0, or leave it out.")
    aspects = fields.get("aspects", {})
    if not isinstance(aspects, dict) or not all(
        isinstance(verdict, str) and verdict in VERDICTS for verdict in aspects.values()
    ):
        raise record.error("aspects", f"is {aspects!r:.60}.", f"Map each aspect to one of {', '.join(VERDICTS)}.")
    if not isinstance(fields.get("source", ""), str):
        raise record.error("source", f"is {fields['source']!r:.40}.", "Use a string, or leave it out.")


def _check_group(record: Record) -> None:
    fields, count = record.fields, len(record.responses)
    rewards = fields.get("rewards")
    if not isinstance(rewards, list) or len(rewards) != count or not all(map(_is_number, rewards)):
        raise record.error("rewards", f"is {rewards!r:.60}.", f"Give {count} numbers, one a response.")
    finished = fields.get("finished", [True] * count)
    if not isinstance(finished, list) or len(finished) != count or not all(isinstance(f, bool) for f in finished):
        raise record.error("finished", f"is {finished!r:.60}.", f"Give {count} times true or false, one a response.")
    logprobs = fields.get("logprobs", [])
    if not isinstance(logprobs, list) or (logprobs and len(logprobs) != count):
        raise record.error("logprobs", f"is {logprobs!r:.60}.", f"Give {count} lists, one a response, or none.")
    for index, (response, values) in enumerate(zip(record.responses, logprobs, strict=False)):
        name = f"logprobs[{index}]"
        if not isinstance(values, list) or not all(_is_number(value) and value <= 0 for value in values):
            raise record.error(name, "is no list of numbers up to 0.", "Give one a token.")
        if not (isinstance(response, list) and len(response) == len(values) and type(response[0]) is int):
            raise record.error(
                name, f"has {len(values)} numbers, not one a token.", "Give the response as the token ids served."
            )
    baseline = fields.get("reference_reward")
    if baseline is not None and not _is_number(baseline):
        raise record.error("reference_reward", f"is {baseline!r}.", "Use a number, or leave it out.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
