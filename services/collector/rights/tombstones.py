"""What must not come back: hashes of forgotten users and of the prompts that went with them, and no content.

A record that is read again from the stream, or comes late, is dropped when it is one of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from sqlalchemy import Connection, insert, select, text

from services.collector import inbox, many
from services.collector.submission import Submission
from services.collector.tables import generations, tombstones
from thumbwheel import errors
from thumbwheel.forgotten import is_forgotten, prompt_hash, user_hash
from thumbwheel.v1.events_pb2 import GenerationEvent

_PRESENT = "SELECT hash FROM tombstones WHERE hash IN (:many)"


def bury(connection: Connection, hashes: Iterable[bytes], erasure_id: str) -> None:
    """Sets tombstones, each once."""
    wanted = list(dict.fromkeys(hashes))
    there = present(connection, wanted)
    rows = [{"hash": each, "erasure_id": erasure_id} for each in wanted if each not in there]
    if rows:
        connection.execute(insert(tombstones), rows)


def present(connection: Connection, hashes: Sequence[bytes]) -> set[bytes]:
    """Those of the hashes that have a tombstone."""
    return {bytes(hash) for (hash,) in many.find(connection, _PRESENT, hashes)}


def admitted(connection: Connection, events: Sequence[GenerationEvent]) -> list[GenerationEvent]:
    """The generations but those of forgotten users, and those without a user that answer an erased prompt."""
    users = [user_hash(event.tenant, event.user_id) for event in events]
    prompts = [prompt_hash(event.tenant, event.generation.prompt_id) for event in events]
    there = present(connection, [*dict.fromkeys((*users, *prompts))])
    return [event for event in events if not is_forgotten(event, there)]


def of_erasures(connection: Connection, erasure_ids: Sequence[str]) -> dict[str, list[bytes]]:
    """The tombstones that these erasures set, by erasure; those that set none are left out."""
    found: dict[str, list[bytes]] = {}
    query = "SELECT erasure_id, hash FROM tombstones WHERE erasure_id IN (:many)"
    for erasure_id, digest in many.find(connection, query, erasure_ids):
        found.setdefault(erasure_id, []).append(bytes(digest))
    return found


def refused(
    connection: Connection, tenant: str, submissions: Sequence[Submission]
) -> list[errors.FailedPrecondition | None]:
    """Of each submission: an error where its user was forgotten, or what it is about was erased."""
    return refused_by(connection, tenant, submissions, present(connection, sorted(hashes_of(tenant, submissions))))


def hashes_of(tenant: str, submissions: Sequence[Submission]) -> set[bytes]:
    """The tombstones that submissions would be refused by."""
    users = {user_hash(tenant, one.feedback.user_id) for one in submissions}
    return users | {prompt_hash(tenant, one.prompt_id) for one in submissions}


def refused_by(
    connection: Connection, tenant: str, submissions: Sequence[Submission], there: Set[bytes]
) -> list[errors.FailedPrecondition | None]:
    """As `refused`, of those tombstones that are `there`."""
    if not there:
        return [None] * len(submissions)
    return [
        _forgotten("feedback.user_id")
        if user_hash(tenant, one.feedback.user_id) in there
        else _erased()
        if prompt_hash(tenant, one.prompt_id) in there and not _is_left(connection, tenant, one.prompt_id)
        else None
        for one in submissions
    ]


def _is_left(connection: Connection, tenant: str, prompt_id: str) -> bool:
    """Whether a prompt with a tombstone has responses: it has one also where a forgotten user judged it before its
    responses, another user's, had arrived.
    """
    # By prompt alone: given the tenant too, SQLite reads everything of that tenant.
    tenants = select(generations.c.tenant).where(generations.c.prompt_id == prompt_id)
    return tenant in connection.execute(tenants).scalars()


def clear_inbox(connection: Connection) -> None:
    """Takes out of the inbox what forgotten users said, were it acknowledged while they were being forgotten."""
    if connection.dialect.name == "postgresql":  # what is on its way in comes first, and after it knows the tombstone
        connection.execute(text("LOCK TABLE door.inbox IN SHARE ROW EXCLUSIVE MODE"))
    users = {user_hash(*who): who for who in inbox.users(connection)}
    for forgotten in present(connection, list(users)):
        inbox.erase(connection, *users[forgotten])


def refuse_user(connection: Connection, tenant: str, user_id: str, *, field: str) -> None:
    """Raises `errors.FailedPrecondition` for a user who was forgotten; `field` is where the user is named."""
    if present(connection, [user_hash(tenant, user_id)]):
        raise _forgotten(field)


def _forgotten(field: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"{field}: this user was forgotten.", remedy="Give a user who comes back a new pseudonym."
    )


def _erased() -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        "feedback: the response it is about was erased.", remedy="Leave it; there is nothing left to judge."
    )
