"""The annotation guidelines: what people are told before they judge, in versions that votes refer to.

A version is made when its text is first asked for or changed, and never changes after: a vote says by which it was
given. The three aspects below are everybody's; a tenant that declares aspects of its own closes its list with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, delete, insert, select

from services.collector.outbox import now_micros
from services.collector.submission import MAX_ASPECT_CHARACTERS, Submission
from services.collector.tables import aspects, guidelines
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import AspectGuideline, GetGuidelinesResponse

ASPECTS = ("helpfulness", "harmlessness", "fluency")
_TEXTS = Path(__file__).parent / "guidelines"


def newest(connection: Connection, tenant: str) -> GetGuidelinesResponse | None:
    """The newest version, where it still says what is to be said; None where `publish` has to make one."""
    last = _last(connection, tenant)
    return last if last is not None and _content(last) == _content(_draft(connection, tenant)) else None


def publish(connection: Connection, tenant: str) -> GetGuidelinesResponse:
    """The newest version; makes it where the text changed since."""
    last, draft = _last(connection, tenant), _draft(connection, tenant)
    if last is not None and _content(last) == _content(draft):
        return last
    draft.number = 1 if last is None else last.number + 1
    draft.version = f"{draft.number}-{_content(draft).hex()[:16]}"
    connection.execute(
        insert(guidelines),
        {
            "tenant": tenant,
            "number": draft.number,
            "version": draft.version,
            "document": draft.SerializeToString(deterministic=True),
            "created_at": now_micros(),
        },
    )
    return draft


def version(connection: Connection, tenant: str, wanted: str) -> GetGuidelinesResponse:
    """A version that was shown to people once. Raises `errors.NotFound`."""
    document = connection.execute(
        select(guidelines.c.document).where(guidelines.c.tenant == tenant, guidelines.c.version == wanted)
    ).scalar_one_or_none()
    if document is None:
        raise errors.NotFound(
            f"version: there are no guidelines {wanted!r}.", remedy="Leave it out for the newest version."
        )
    return GetGuidelinesResponse.FromString(document)


def declare(connection: Connection, tenant: str, own: dict[str, str]) -> GetGuidelinesResponse:
    """Makes these the tenant's own aspects, with how to judge each; none opens its list again. Returns the new version.

    Raises `errors.InvalidArgument` for a name that is empty, too long, or one of everybody's, and for an empty text.
    """
    for name, text in own.items():
        if not name.strip() or len(name) > MAX_ASPECT_CHARACTERS or name in ASPECTS:
            raise errors.InvalidArgument(
                f"is {name!r}.",
                field="aspect",
                remedy=f"Give 1 to {MAX_ASPECT_CHARACTERS} characters, and none of {', '.join(ASPECTS)}.",
            )
        if not text.strip():
            raise errors.InvalidArgument("is empty.", field=f"aspect {name}", remedy="Say how to judge it.")
    now = now_micros()
    connection.execute(delete(aspects).where(aspects.c.tenant == tenant))
    if own:
        rows = [{"tenant": tenant, "aspect": name, "text": text, "declared_at": now} for name, text in own.items()]
        connection.execute(insert(aspects), rows)
    return publish(connection, tenant)


def refused(
    connection: Connection, tenant: str, submissions: Sequence[Submission]
) -> list[errors.InvalidArgument | None]:
    """Of each submission: an error for guidelines that were never shown, or aspects that the tenant has not."""
    wanted = {one.feedback.guidelines_version for one in submissions} - {""}
    shown: set[str] = set()
    if wanted:
        known = select(guidelines.c.version).where(guidelines.c.tenant == tenant, guidelines.c.version.in_(wanted))
        shown = set(connection.execute(known).scalars())
    judged = [
        [aspect.aspect for aspect in getattr(getattr(one.feedback, one.kind), "aspects", ())] for one in submissions
    ]
    own: set[str] = set()
    if any(judged):
        own = set(connection.execute(select(aspects.c.aspect).where(aspects.c.tenant == tenant)).scalars())
    return [_refused(one, names, shown, own) for one, names in zip(submissions, judged, strict=True)]


def _refused(
    submission: Submission, judged: Sequence[str], shown: set[str], own: set[str]
) -> errors.InvalidArgument | None:
    version = submission.feedback.guidelines_version
    if version and version not in shown:
        return errors.InvalidArgument(
            f"is {version!r}, which was never published.",
            field="feedback.guidelines_version",
            remedy="Show people what GetGuidelines returns, and send the version that it names.",
        )
    for index, name in enumerate(judged):
        if own and name not in own and name not in ASPECTS:
            return errors.InvalidArgument(
                f"is {name!r}, which tenant {submission.tenant!r} has not declared.",
                field=f"feedback.{submission.kind}.aspects[{index}].aspect",
                remedy=f"Use one of {', '.join([*ASPECTS, *sorted(own)])}.",
            )
    return None


def _last(connection: Connection, tenant: str) -> GetGuidelinesResponse | None:
    document = connection.execute(
        select(guidelines.c.document).where(guidelines.c.tenant == tenant).order_by(guidelines.c.number.desc()).limit(1)
    ).scalar_one_or_none()
    return None if document is None else GetGuidelinesResponse.FromString(document)


def _draft(connection: Connection, tenant: str) -> GetGuidelinesResponse:
    own = connection.execute(
        select(aspects.c.aspect, aspects.c.text).where(aspects.c.tenant == tenant).order_by(aspects.c.aspect)
    ).all()
    return GetGuidelinesResponse(
        text=(_TEXTS / "judging.md").read_text(),
        aspects=[
            *(AspectGuideline(aspect=name, text=(_TEXTS / f"{name}.md").read_text()) for name in ASPECTS),
            *(AspectGuideline(aspect=name, text=text) for name, text in own),
        ],
        closed=bool(own),
    )


def _content(document: GetGuidelinesResponse) -> bytes:
    """What a version says, without its number."""
    bare = GetGuidelinesResponse(text=document.text, aspects=document.aspects, closed=document.closed)
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()
