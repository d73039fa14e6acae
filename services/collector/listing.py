"""Feedback listed by where it stands and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from services.collector import records
from services.collector.inbox import RECEIVED, record_of
from services.collector.submission import check_id
from services.collector.tables import feedback, inbox
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import FeedbackRecord, FeedbackState, ListFeedbackRequest, ListFeedbackResponse

PAGE, MAX_PAGE = 100, 1_000
_HELD = "HELD"


def check(request: ListFeedbackRequest) -> None:
    """Refuses what cannot be listed by. Raises `errors.InvalidArgument`."""
    for index, state in enumerate(request.states):
        if state not in FeedbackState.values() or not state:
            raise errors.InvalidArgument(
                f"is {state}, which is no state.", field=f"states[{index}]", remedy="Send a FeedbackState."
            )
    if request.page_size > MAX_PAGE:
        raise errors.InvalidArgument(f"is {request.page_size}.", field="page_size", remedy=f"Send at most {MAX_PAGE}.")
    for field in ("reason", "user_id", "prompt_id", "page_token"):
        if value := getattr(request, field):
            check_id(value, field)


def page(connection: Connection, request: ListFeedbackRequest, tenant: str) -> ListFeedbackResponse:
    """A page of the tenant's feedback, newest first; what is yet to be recorded is listed as held."""
    size = request.page_size or PAGE
    found: dict[str, FeedbackRecord] = {}
    states = {records.name_of(state) for state in request.states}
    # In this order: what is recorded meanwhile is in both, and stands as it was recorded.
    if (not states or _HELD in states) and request.reason in ("", RECEIVED):
        rows = connection.execute(_newest(inbox, request, tenant, ("user_id", "prompt_id")).limit(size + 1))
        found |= {row.feedback_id: record_of(row) for row in rows}
    wanted = _newest(feedback, request, tenant, ("reason", "user_id", "prompt_id"))
    if states:
        wanted = wanted.where(feedback.c.state.in_(states))
    found |= {row.feedback_id: records.record_of(row) for row in connection.execute(wanted.limit(size + 1))}
    newest = sorted(found.values(), key=lambda record: record.feedback_id, reverse=True)
    shown = newest[:size]
    return ListFeedbackResponse(
        records=shown,
        next_page_token=shown[-1].feedback_id if len(newest) > size else "",
    )


def _newest(table: Table, request: ListFeedbackRequest, tenant: str, by: Sequence[str]) -> Select[Any]:
    wanted = select(table).where(table.c.tenant == tenant)
    for name in by:
        if value := getattr(request, name):
            wanted = wanted.where(table.c[name] == value)
    if request.page_token:  # ids sort by time
        wanted = wanted.where(table.c.feedback_id < request.page_token)
    return wanted.order_by(table.c.feedback_id.desc())
