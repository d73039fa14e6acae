"""Feedback listed by where it stands and why."""

from __future__ import annotations

from sqlalchemy import Connection, select

from services.collector import records
from services.collector.submission import check_id
from services.collector.tables import feedback
from thumbwheel import errors
from thumbwheel.v1.preference_pb2 import FeedbackState, ListFeedbackRequest, ListFeedbackResponse

PAGE, MAX_PAGE = 100, 1_000


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
    """A page of the tenant's feedback, newest first."""
    size = request.page_size or PAGE
    wanted = select(feedback).where(feedback.c.tenant == tenant)
    if request.states:
        wanted = wanted.where(feedback.c.state.in_([records.name_of(state) for state in request.states]))
    for name in ("reason", "user_id", "prompt_id"):
        if value := getattr(request, name):
            wanted = wanted.where(feedback.c[name] == value)
    if request.page_token:  # ids sort by time
        wanted = wanted.where(feedback.c.feedback_id < request.page_token)
    rows = connection.execute(wanted.order_by(feedback.c.feedback_id.desc()).limit(size + 1)).all()
    shown = rows[:size]
    return ListFeedbackResponse(
        records=[records.record_of(row) for row in shown],
        next_page_token=shown[-1].feedback_id if len(rows) > size else "",
    )
