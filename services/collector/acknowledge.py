"""What is decided before feedback is acknowledged: is it a repetition, may it come in? Then it is put into the inbox.

    key known? ──▶ forgotten? ──▶ guidelines, aspects ──▶ propensity ──▶ inbox
         │                             │
         ▼                             ▼
    the first result                refused

As many pieces at once as share a commit: one statement for all. Everything that follows
from feedback, `taking` does later, in a process of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from sqlalchemy import Connection

from services.collector import guide, inbox, many, picked
from services.collector.identity import Arrival
from services.collector.inbox import Waiting
from services.collector.picked import Noted
from services.collector.rights import tombstones
from services.collector.submission import Submission
from thumbwheel import errors

# One for all that it takes to know: of a small group, each statement costs as much as writing it.
_LOOK = """
SELECT 'key', idempotency_key, feedback_id, body_sha256, received_at, CAST(NULL AS FLOAT) FROM door.inbox
WHERE tenant = :tenant AND idempotency_key IN (:keys)
UNION ALL
SELECT 'key', idempotency_key, feedback_id, body_sha256, received_at, NULL FROM feedback
WHERE tenant = :tenant AND idempotency_key IN (:keys)
UNION ALL
SELECT 'tombstone', '', '', hash, 0, NULL FROM tombstones WHERE hash IN (:hashes)
UNION ALL
SELECT 'shown', user_id, first_id, item, 0, propensity FROM shown
WHERE tenant = :tenant AND (user_id, item) IN (VALUES :items)
"""
_NO_ITEM = ("", b"")


class Incoming(NamedTuple):
    """A submission that is to be acknowledged."""

    submission: Submission
    traceparent: str = ""


class Acknowledged(NamedTuple):
    """Feedback that is in: by this call, or `changed` is false and by an earlier one."""

    feedback_id: str
    received_at: int
    changed: bool


Result: TypeAlias = Acknowledged | errors.ThumbwheelError


def acknowledge(connection: Connection, incoming: Sequence[Incoming]) -> list[Result]:
    """Puts submissions into the inbox, in their order. Returns of each what it came to.

    The same submission again changes nothing. What is refused comes back as the error, in its place: `errors.Conflict`
    where the key was used with another body, `errors.InvalidArgument` for guidelines, aspects or a propensity that this
    tenant does not have, `errors.FailedPrecondition` where the user, or what it is about, was forgotten.
    """
    by_tenant: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(incoming):
        by_tenant[one.submission.tenant].append(number)
    results: dict[int, Result] = {}
    for tenant, numbers in by_tenant.items():
        found = _acknowledge(connection, tenant, [incoming[number] for number in numbers])
        results.update(zip(numbers, found, strict=True))
    return [results[number] for number in range(len(incoming))]


def _acknowledge(connection: Connection, tenant: str, incoming: Sequence[Incoming]) -> list[Result]:
    submissions = [one.submission for one in incoming]
    keys = [one.feedback.idempotency_key for one in submissions]
    found = _look(connection, tenant, submissions, keys)
    forgotten = tombstones.refused_by(connection, tenant, submissions, found.tombstones)
    misguided = guide.refused(connection, tenant, submissions)
    shown = picked.propensities_by(submissions, found.noted)
    results: list[Result] = []
    rows: list[Waiting] = []
    for number, (one, key) in enumerate(zip(incoming, keys, strict=True)):
        sha256 = one.submission.body_sha256
        verdict = forgotten[number] or misguided[number] or shown[number]
        if key in found.known:
            known, first = found.known[key]
            results.append(first if known == sha256 else _conflict(key))
        elif isinstance(verdict, errors.ThumbwheelError):
            results.append(verdict)
        else:
            row = _row(one, verdict)
            rows.append(row)
            found.known[key] = sha256, Acknowledged(row.feedback_id, row.received_at, False)
            results.append(Acknowledged(row.feedback_id, row.received_at, True))
    inbox.put(connection, rows)
    return results


class _Found(NamedTuple):
    """What is known of submissions: of keys what they came with and came to, tombstones, and what was shown."""

    known: dict[str, tuple[bytes, Acknowledged]]
    tombstones: set[bytes]
    noted: dict[tuple[str, bytes], Noted]


def _look(connection: Connection, tenant: str, submissions: Sequence[Submission], keys: Sequence[str]) -> _Found:
    lists = {
        "keys": keys,
        "hashes": sorted(tombstones.hashes_of(tenant, submissions)),
        "items": picked.items_of(submissions) or [_NO_ITEM],
    }
    found = _Found({}, set(), {})
    for what, name, id, digest, at, propensity in many.find_all(connection, _LOOK, lists, tenant=tenant):
        if what == "key":
            found.known[name] = bytes(digest), Acknowledged(id, at, False)
        elif what == "tombstone":
            found.tombstones.add(bytes(digest))
        else:
            found.noted[name, bytes(digest)] = Noted(id, propensity)
    return found


def _row(incoming: Incoming, propensity: float | None) -> Waiting:
    submission, arrival = incoming.submission, Arrival.now()
    return Waiting(
        arrival.feedback_id,
        submission.tenant,
        submission.feedback.idempotency_key,
        submission.body_sha256,
        submission.feedback.user_id,
        submission.kind,
        submission.body,
        submission.prompt_id,
        submission.consent,
        propensity,
        incoming.traceparent,
        arrival.micros,
    )


def _conflict(key: str) -> errors.Conflict:
    return errors.Conflict(
        f"feedback.idempotency_key: {key!r} was used before with other content.",
        remedy="Use a new key for new feedback, and send a repeated one unchanged.",
    )
