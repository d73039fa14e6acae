"""What is learnt from, written to a file in a format of the field. In constant memory, and known to Forget.

accepted events of the outbox, page by page ──▶ redacted ──▶ rendered ──▶ FILE.part and FILE.ids ──▶ FILE

A row that was retracted, or whose weight changed since, is written once or not at all, as it last stood. Ties are left
out: the formats know none.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from sqlalchemy import Connection, func, select

from services.collector import tables
from services.collector.database import Database
from services.collector.emit import SampleEvent
from services.collector.exchange import formats
from services.collector.exchange.report import Refusals
from services.collector.exchange.rows import Paired, Role, Row, RowError, Turn, Unpaired, checked_prompt
from services.collector.outbox import now_micros
from services.collector.rights import copies
from services.collector.rights.redaction import Redact, redact_message
from thumbwheel import errors, files
from thumbwheel.stream import topics
from thumbwheel.v1 import policy_pb2 as policy_pb
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, ThumbEvent
from thumbwheel.v1.preference_pb2 import ThumbValue

PAGE = 200
_ROLES: dict[int, Role] = {
    policy_pb.ROLE_SYSTEM: "system",
    policy_pb.ROLE_USER: "user",
    policy_pb.ROLE_ASSISTANT: "assistant",
}

Progress = Callable[[int], None]


class Exported(NamedTuple):
    """What an export came to, in rows."""

    exported: int
    refused: int


async def export_file(
    database: Database,
    tenant: str,
    path: Path,
    name: str,
    redact: Redact | None,
    refused: Refusals,
    progress: Progress,
) -> Exported:
    """Writes all that a tenant's feedback has come to; `progress` is told of the events looked at.

    The file appears whole. Raises `errors.FailedPrecondition` where it is there already or cannot be written,
    `errors.NoSpace`, and what `Database.read` raises.
    """
    _require_absent(path)
    started, count, part = now_micros(), 0, copies.part_of(path)
    await database.write(partial(copies.register, tenant=tenant, path=path))
    try:
        with (
            files.space_errors(path.parent, 0, "an export"),
            copies.index_of(path).open("wb") as index,
            part.open("wb") as out,
            copies.held(out),
        ):
            async for sample, event in _accepted(database, tenant, _source(name), progress):
                try:
                    if redact is not None:
                        redact_message(event, redact)
                    fields = formats.FORMATS[name].render(row_of(event))
                except (RowError, errors.InvalidArgument) as error:
                    refused.add(str(error), comparison=sample)
                    continue
                _write(index, out, sample, json.dumps(fields, ensure_ascii=False).encode())
                count += 1
            for file in (index, out):
                file.flush()
                os.fsync(file.fileno())
        part.rename(path)
        files.sync(path.parent)
    except OSError as error:
        raise errors.FailedPrecondition(
            f"{path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error
    # What was erased while it was being written may have been read before and written after.
    erased = await database.read(partial(_erased_since, started=started))
    if erased:
        count -= copies.scrub(path, erased)
    return Exported(count, refused.count)


def _require_absent(path: Path) -> None:
    """An export that is there would lose its index, and what is in it could not be erased any more."""
    if path.exists():
        raise errors.FailedPrecondition(f"{path} is there already.", remedy="Remove it, or name another file.")


def size(connection: Connection, name: str) -> int:
    """How many events there are to look at for a format: the end of the progress."""
    count = select(func.count()).select_from(tables.outbox).where(tables.outbox.c.topic == _source(name))
    return int(connection.execute(count).scalar_one())


def row_of(event: SampleEvent) -> Row:
    """The row that a sample is. Raises `RowError`."""
    if isinstance(event, ThumbEvent):
        return Unpaired(_turns(event.prompt), event.response.text, event.value == ThumbValue.THUMB_VALUE_UP)
    return Paired(_turns(event.prompt), event.chosen.text, event.rejected.text)


def _source(name: str) -> str:
    """The topic whose events a format has rows of: thumbs that were paired are comparisons."""
    return topics.COMPARISONS if formats.FORMATS[name].paired else topics.THUMBS


def _turns(prompt: policy_pb.Prompt) -> tuple[Turn, ...]:
    match prompt.WhichOneof("content"):
        case "chat":
            turns = tuple(Turn(_ROLES[message.role], message.content) for message in prompt.chat.messages)
            return checked_prompt(turns)
        case "text":
            return checked_prompt((Turn("user", prompt.text),))
        case _:
            raise RowError("prompt: is given as token ids, and not as text")


def _write(index: IO[bytes], out: IO[bytes], sample: str, line: bytes) -> None:
    """The index first: a row that it does not name could not be found again."""
    index.write(f"{copies.line_hash(line)} {sample}\n".encode())
    index.flush()
    out.write(line + b"\n")


async def _accepted(
    database: Database, tenant: str, topic: str, progress: Progress
) -> AsyncIterator[tuple[str, SampleEvent]]:
    """The last acceptance of every sample that stands, in the order in which they were published."""
    last, after, seen = await database.read(_end), 0, 0
    while True:
        page, stands = await database.read(partial(_page, topic=topic, after=after, last=last))
        if not page:
            return
        for number, event in page:
            if isinstance(event, ComparisonEvent) and event.tie:
                continue
            if event.tenant == tenant and stands.get(_id(event)) == number:
                yield _id(event), event
        after, seen = page[-1][0], seen + len(page)
        progress(seen)


def _end(connection: Connection) -> int:
    return connection.execute(select(func.max(tables.outbox.c.id))).scalar_one() or 0


def _page(
    connection: Connection, topic: str, after: int, last: int
) -> tuple[list[tuple[int, SampleEvent]], dict[str, int]]:
    """Samples published after a row, and, for each that stands, the row with its last acceptance."""
    row = tables.outbox.c
    rows = connection.execute(
        select(row.id, row.key, row.value)
        .where(row.topic == topic, row.id > after, row.id <= last)
        .order_by(row.id)
        .limit(PAGE)
    ).all()
    page = [(number, _decoded(topic, value)) for number, _, value in rows]
    keys: Sequence[bytes] = sorted({key for _, key, _ in rows})
    history = connection.execute(
        select(row.id, row.value).where(row.topic == topic, row.key.in_(keys), row.id <= last).order_by(row.id)
    )
    stands: dict[str, int] = {}
    for number, value in history:
        event = _decoded(topic, value)
        if event.state == ComparisonState.COMPARISON_STATE_ACCEPTED:
            stands[_id(event)] = number
        else:
            stands.pop(_id(event), None)
    return page, stands


def _decoded(topic: str, value: bytes) -> SampleEvent:
    return ThumbEvent.FromString(value) if topic == topics.THUMBS else ComparisonEvent.FromString(value)


def _id(event: SampleEvent) -> str:
    return event.thumb_id if isinstance(event, ThumbEvent) else event.comparison_id


def _erased_since(connection: Connection, started: int) -> set[str]:
    late = select(tables.erasures.c.erasure_id).where(tables.erasures.c.requested_at >= started)
    found = select(tables.erased_samples.c.sample_id).where(tables.erased_samples.c.erasure_id.in_(late))
    return set(connection.execute(found).scalars())
