"""Preferences from elsewhere come in as feedback: curated, published and learnt from like any other.

line ──▶ row ──▶ generations with receipts of our own · feedback on them ──▶ group commits of the record

The ids follow from the content: a row that is there already, from whatever file, changes nothing. Each row has a rater
of its own, since nobody knows who judged it; all are asked for by one user, `import:NAME`: to forget that one takes all
of the import back.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection

from services.collector import intake, ledger
from services.collector.database import Database
from services.collector.exchange import reading
from services.collector.exchange.reading import Line
from services.collector.exchange.report import Refusals
from services.collector.exchange.rows import Row, Turn, Unpaired, digest
from services.collector.intake import Curator, Incoming
from services.collector.rights import admission
from services.collector.rights.tenants import Tenants
from services.collector.submission import Checker, Submission, check_id
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import (
    Chat,
    ChatMessage,
    FinishReason,
    Generation,
    Prompt,
    ReceiptClaims,
    Role,
)
from thumbwheel.v1.preference_pb2 import Comparison, Feedback, Preference, Thumb, ThumbValue

ROWS_A_COMMIT = 100
_NAMESPACE = uuid.UUID("6f0c8f2e-6a53-5a36-9d0e-2f9f3f4f7c11")
_ROLES = {"system": Role.ROLE_SYSTEM, "user": Role.ROLE_USER, "assistant": Role.ROLE_ASSISTANT}

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Whose data it is, and what it is called."""

    tenant: str
    name: str
    consent: bool
    """The people whose data it is agree that it is learnt from."""

    key: ReceiptKey
    tenants: Tenants

    def __post_init__(self) -> None:
        check_id(self.tenant, "tenant")
        check_id(self.user_id, "name")
        if self.tenants[self.tenant].consent_required and not self.consent:
            raise errors.FailedPrecondition(
                f"Tenant {self.tenant!r} requires consent.",
                remedy="Give --consent where the people whose data this is agree that it is learnt from.",
            )

    @property
    def user_id(self) -> str:
        """Who is taken to have asked for all of it."""
        return f"import:{self.name}"


class Imported(NamedTuple):
    """What an import came to, in rows."""

    imported: int
    duplicates: int
    refused: int


class _Item(NamedTuple):
    line: Line
    generations: list[GenerationEvent]
    submission: Submission


async def import_file(
    database: Database,
    curator: Curator,
    source: Source,
    path: Path,
    name: str,
    refused: Refusals,
    progress: Progress,
) -> Imported:
    """Takes a file in, in constant memory; `progress` is told of the bytes read. Safe to interrupt and to repeat.

    Raises `errors.FailedPrecondition` for a file that cannot be read, and what `Database.write` raises.
    """
    imported = duplicates = 0
    batch: list[_Item] = []

    async def commit() -> None:
        nonlocal imported, duplicates
        outcomes = await database.write(partial(_put, curator=curator, source=source, batch=list(batch)))
        for item, outcome in zip(batch, outcomes, strict=True):
            imported += outcome == "imported"
            duplicates += outcome == "duplicate"
            if outcome not in ("imported", "duplicate"):
                refused.add(outcome, line=item.line.number)
        progress(batch[-1].line.position)
        batch.clear()

    for line in reading.read(path, name):
        if line.row is None:
            refused.add(line.reason, line=line.number)
            continue
        batch.append(_Item(line, *convert(line.row, source)))
        if len(batch) == ROWS_A_COMMIT:
            await commit()
    if batch:
        await commit()
    return Imported(imported, duplicates, refused.count)


def convert(row: Row, source: Source) -> tuple[list[GenerationEvent], Submission]:
    """The generations and the feedback that say what a row says."""
    prompt_id = _id("prompt", source.tenant, digest(row.prompt).hex())
    texts = [row.completion] if isinstance(row, Unpaired) else [row.chosen, row.rejected]
    events = [_generation(row.prompt, prompt_id, text, source) for text in texts]
    key = digest(row).hex()
    feedback = Feedback(idempotency_key=f"import:{key}", user_id=f"{source.user_id[:60]}:{key[:32]}")
    if source.consent:
        feedback.consent = True
    receipts = [event.generation.receipt for event in events]
    if isinstance(row, Unpaired):
        value = ThumbValue.THUMB_VALUE_UP if row.label else ThumbValue.THUMB_VALUE_DOWN
        feedback.thumb.CopyFrom(Thumb(receipt=receipts[0], value=value))
    else:
        vote = Comparison(a=receipts[0], b=receipts[1], preference=Preference.PREFERENCE_A)
        feedback.comparison.CopyFrom(vote)
    return events, _submission(feedback, source)


def _submission(feedback: Feedback, source: Source) -> Submission:
    return Checker(source.key, 0, source.tenants).check(feedback, tenant=source.tenant)


def _generation(turns: Sequence[Turn], prompt_id: str, text: str, source: Source) -> GenerationEvent:
    id = _id("response", prompt_id, hashlib.sha256(text.encode()).hexdigest())
    claims = ReceiptClaims(
        tenant=source.tenant,
        generation_id=id,
        prompt_id=prompt_id,
        prompt_sha256=digest(turns),
        response_sha256=hashlib.sha256(text.encode()).digest(),
    )
    messages = [ChatMessage(role=_ROLES[turn.role], content=turn.content) for turn in turns]
    generation = Generation(
        generation_id=id,
        prompt_id=prompt_id,
        text=text,
        finish_reason=FinishReason.FINISH_REASON_STOP,
        receipt=source.key.sign(claims),
    )
    event = GenerationEvent(
        event_id=id,
        tenant=source.tenant,
        user_id=source.user_id,
        prompt=Prompt(chat=Chat(messages=messages)),
        generation=generation,
        candidate_count=1,
    )
    if source.consent:
        event.consent = True
    return event


def _id(*names: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "\n".join(names)))


def _put(connection: Connection, curator: Curator, source: Source, batch: Sequence[_Item]) -> list[str]:
    """Writes rows in one transaction. Returns "imported", "duplicate", or why a row was refused, for each."""
    arriving = [event for item in batch for event in item.generations]
    ledger.store(connection, curator, admission.admitted(connection, arriving, source.tenants))
    results = intake.submit(connection, [Incoming(item.submission) for item in batch], curator)
    return [_outcome(result) for result in results]


def _outcome(result: intake.Result) -> str:
    match result:
        case errors.Conflict():
            return "duplicate"  # the same row, imported under another name or without consent
        case errors.FailedPrecondition():
            return "was forgotten"
        case errors.ThumbwheelError():
            raise result
        case _:
            return "imported" if result.changed else "duplicate"
