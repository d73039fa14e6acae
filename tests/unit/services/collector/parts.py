"""What the collector's tests are made of: signed generations, and feedback on them."""

from __future__ import annotations

import asyncio
import hashlib
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from uuid_utils import uuid7

from services.collector import intake, ledger, outbox
from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.identity import Arrival
from services.collector.intake import Curator, Incoming
from services.collector.records import Recorded
from services.collector.submission import Checker, Submission
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey, create_keys
from thumbwheel.stream import topics
from thumbwheel.stream.log import Record
from thumbwheel.v1.events_pb2 import ComparisonEvent, FeedbackEvent, GenerationEvent
from thumbwheel.v1.policy_pb2 import (
    Chat,
    ChatMessage,
    Generation,
    Prompt,
    Receipt,
    ReceiptClaims,
    Role,
    VersionSpan,
)
from thumbwheel.v1.preference_pb2 import (
    Comment,
    Comparison,
    Edit,
    Feedback,
    FeedbackRecord,
    Preference,
    Thumb,
    ThumbValue,
)

A = Preference.PREFERENCE_A
B = Preference.PREFERENCE_B
TIE = Preference.PREFERENCE_TIE
BOTH_BAD = Preference.PREFERENCE_BOTH_BAD

T = TypeVar("T")


_curators: weakref.WeakKeyDictionary[Database, Curator] = weakref.WeakKeyDictionary()


def curator_of(database: Database) -> Curator:
    """The one curator that a database has while it is open."""
    return _curators.setdefault(database, Curator())


async def store(database: Database, *events: GenerationEvent) -> list[Recorded]:
    """Stores generations, as ingest does."""
    return await database.write(partial(ledger.store, curator=curator_of(database), events=events))


async def record(
    database: Database,
    submission: Submission,
    *,
    traceparent: str = "",
    arrival: Arrival | None = None,
    curator: Curator | None = None,
) -> Recorded:
    """Records at once, as imports do."""
    incoming = [Incoming(submission, traceparent, arrival)]
    work = partial(intake.submit, incoming=incoming, curator=curator or curator_of(database))
    [result] = await database.write(work)
    if isinstance(result, errors.ThumbwheelError):
        raise result
    return result


async def retract(database: Database, feedback_id: str, user: str = "ann", tenant: str = "default") -> Recorded:
    """Takes back, as the service does."""
    work = partial(ledger.retract, curator=curator_of(database), feedback_id=feedback_id)
    return await database.write(partial(work, user_id=user, tenant=tenant))


async def find(database: Database, *ids: str, tenant: str = "default") -> list[FeedbackRecord]:
    """The records of these ids."""
    return await database.read(partial(ledger.find, feedback_ids=ids, tenant=tenant))


async def published(database: Database) -> list[ComparisonEvent]:
    """All comparisons that were put in the outbox, in order."""
    rows = await database.read(partial(outbox.waiting, limit=10_000))
    return [ComparisonEvent.FromString(row.value) for row in rows if row.topic == topics.COMPARISONS]


def new_id() -> str:
    return str(uuid7())


async def eventually(read: Callable[[], Awaitable[T]], true: Callable[[T], bool], seconds: float = 20.0) -> T:
    """What `read` brings once it is as wanted. Fails with what it last brought."""
    deadline = time.monotonic() + seconds
    while not true(value := await read()):
        assert time.monotonic() < deadline, f"still {value!r}"
        await asyncio.sleep(0.01)
    return value


@dataclass(frozen=True)
class Deployment:
    """A tenant of a deployment with keys of its own."""

    key: ReceiptKey
    tenant: str = "default"

    @classmethod
    def at(cls, home: Path) -> Deployment:
        create_keys(home / "keys")
        return cls(ReceiptKey.load(home / "keys"))

    def generation(self, text: str = "Paris.", prompt_id: str = "", words: str = "") -> GenerationEvent:
        """A response as the policy serves and publishes it, one token a character."""
        prompt_id = prompt_id or new_id()
        digest = hashlib.sha256(prompt_id.encode()).hexdigest()
        # As unlike others as people's questions are.
        words = words or " ".join(digest[i : i + 6] for i in range(0, 48, 6)) + "?"
        generation_id = new_id()
        tokens = [ord(character) % 32_000 for character in text]
        return GenerationEvent(
            event_id=generation_id,
            tenant=self.tenant,
            prompt=Prompt(chat=Chat(messages=[ChatMessage(role=Role.ROLE_USER, content=words)])),
            prompt_token_ids=[1, 2, 3],
            generation=Generation(
                generation_id=generation_id,
                prompt_id=prompt_id,
                text=text,
                token_ids=tokens,
                logprobs=[-0.5] * len(tokens),
                spans=[VersionSpan(version="policy-000001", start=0, end=len(tokens))],
                receipt=self.receipt(text, generation_id, prompt_id),
            ),
        )

    def receipt(self, text: str, generation_id: str, prompt_id: str) -> Receipt:
        return self.key.sign(
            ReceiptClaims(
                tenant=self.tenant,
                generation_id=generation_id,
                prompt_id=prompt_id,
                prompt_sha256=hashlib.sha256(prompt_id.encode()).digest(),
                response_sha256=hashlib.sha256(text.encode()).digest(),
                version="policy-000001",
            )
        )

    def pair(self, a: str = "Paris.", b: str = "It is Paris, I would say.") -> tuple[GenerationEvent, GenerationEvent]:
        """Two candidates of one request."""
        prompt_id = new_id()
        return self.generation(a, prompt_id), self.generation(b, prompt_id)

    async def submit(self, database: Database, feedback: Feedback) -> Recorded:
        """Checks and records at once, as imports do."""
        submission = Checker(self.key, 1_000).check(feedback, tenant=self.tenant)
        return await record(database, submission)


def comparison(
    a: GenerationEvent, b: GenerationEvent, preference: Preference.ValueType = A, *, key: str = "", user: str = "ann"
) -> Feedback:
    vote = Comparison(a=a.generation.receipt, b=b.generation.receipt, preference=preference)
    return Feedback(idempotency_key=key or new_id(), user_id=user, comparison=vote)


def thumb(event: GenerationEvent, *, up: bool = True, key: str = "", user: str = "ann") -> Feedback:
    value = ThumbValue.THUMB_VALUE_UP if up else ThumbValue.THUMB_VALUE_DOWN
    return Feedback(
        idempotency_key=key or new_id(), user_id=user, thumb=Thumb(receipt=event.generation.receipt, value=value)
    )


def edit(event: GenerationEvent, text: str, *, key: str = "", user: str = "ann") -> Feedback:
    return Feedback(
        idempotency_key=key or new_id(), user_id=user, edit=Edit(receipt=event.generation.receipt, text=text)
    )


def comment(event: GenerationEvent, text: str, *, key: str = "", user: str = "ann") -> Feedback:
    return Feedback(
        idempotency_key=key or new_id(), user_id=user, comment=Comment(receipt=event.generation.receipt, text=text)
    )


def settings(home: Path) -> CollectorSettings:
    """Settings under which nothing waits long."""
    return CollectorSettings(home=home, poll_seconds=0.05, loss_check_seconds=0.05, max_backoff_seconds=0.05)


def comparisons(records: list[Record]) -> list[ComparisonEvent]:
    return [ComparisonEvent.FromString(record.value) for record in records]


def feedback_records(values: list[bytes]) -> list[FeedbackRecord]:
    return [FeedbackEvent.FromString(value).record for value in values]


def feedback_events(records: list[Record]) -> list[FeedbackEvent]:
    return [FeedbackEvent.FromString(record.value) for record in records]
