"""The history checker itself: it passes what is right, and finds each violation that is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.checker import (
    Acked,
    AckedRetraction,
    Asked,
    AskedToRetract,
    Delivery,
    FeedbackRow,
    History,
    OutboxRow,
    Vote,
    check,
)

F, C = "feedback", "comparisons"
FIRST = Vote("k1", "p", "a1", "b1")
SECOND = Vote("k2", "p", "b2", "a2")
THUMB = Vote("k3", "p")


def told(life: int, event: str, state: str, id: str) -> Delivery:
    return Delivery(life, F, "p", event, state, (id,))


def good() -> History:
    """Two votes on one prompt and a thumb; the first vote was sent twice and is retracted. The broker was restarted."""
    accepted = [
        Delivery(2, C, "p", "c1", "ACCEPTED", ("f1",), "x1", "a1", "b1"),
        Delivery(2, C, "p", "c2", "ACCEPTED", ("f2",), "x2", "b2", "a2"),
        Delivery(2, C, "p", "c3", "RETRACTED", ("f1",), "x1"),
    ]
    events = [
        told(2, "e1", "ACCEPTED", "f1"),
        told(2, "e2", "ACCEPTED", "f2"),
        told(2, "e3", "RECORDED", "f3"),
        told(2, "e4", "RETRACTED", "f1"),
    ]
    first_life = [replace_life(accepted[0], 1), replace_life(events[0], 1)]
    return History(
        journal=[
            *(Asked(FIRST), Acked("k1", "f1"), Asked(FIRST), Acked("k1", "f1")),
            *(Asked(SECOND), Acked("k2", "f2"), Asked(THUMB), Acked("k3", "f3")),
            *(AskedToRetract("f1"), AckedRetraction("f1")),
        ],
        stream=[*first_life, *accepted, *events],
        feedback=[
            FeedbackRow("f1", "k1", "RETRACTED", "x1", 2),
            FeedbackRow("f2", "k2", "ACCEPTED", "x2", 2),
            FeedbackRow("f3", "k3", "RECORDED", "", 1),
        ],
        outbox=[
            *(OutboxRow(1, "e1", F, "p", True), OutboxRow(2, "c1", C, "p", True)),
            *(OutboxRow(3, "e2", F, "p", True), OutboxRow(4, "c2", C, "p", True)),
            OutboxRow(5, "e3", F, "p", True),
            *(OutboxRow(6, "e4", F, "p", True), OutboxRow(7, "c3", C, "p", True)),
        ],
        feedback_topic=F,
        comparisons_topic=C,
        last_life=2,
    )


def replace_life(delivery: Delivery, life: int) -> Delivery:
    return delivery._replace(life=life)


def without(history: History, event: str, life: int = 2) -> History:
    return replace(history, stream=[d for d in history.stream if (d.event_id, d.life) != (event, life)])


def swapped(history: History, one: str, other: str) -> History:
    stream = list(history.stream)
    i, j = (stream.index(next(d for d in stream if (d.event_id, d.life) == (event, 2))) for event in (one, other))
    stream[i], stream[j] = stream[j], stream[i]
    return replace(history, stream=stream)


def rows(history: History, change: Callable[[FeedbackRow], FeedbackRow | None]) -> History:
    return replace(history, feedback=[row for old in history.feedback if (row := change(old)) is not None])


def test_a_right_history_holds() -> None:
    verdict = check(good())
    assert verdict.holds
    assert verdict.counts == {
        "submissions": 3,
        "acknowledged": 3,
        "retracted": 1,
        "comparisons": 2,
        "records": 9,
        "repeated": 2,
    }


def test_a_vote_taken_back_while_it_waits_needs_no_comparison() -> None:
    history = rows(good(), lambda row: row._replace(comparison_id="") if row.key == "k1" else row)
    gone = {"c1", "c3"}
    history = replace(
        history,
        stream=[d for d in history.stream if d.event_id not in gone],
        outbox=[row for row in history.outbox if row.event_id not in gone],
    )
    assert check(history).holds


def test_an_unanswered_submission_may_be_there_or_not() -> None:
    history = good()
    history = replace(history, journal=[*history.journal, Asked(Vote("k4", "p", "a4", "b4"))])
    assert check(history).holds


LOST: dict[str, Callable[[History], History]] = {
    "from the database": lambda h: rows(h, lambda row: row if row.key != "k2" else None),
    "under another id": lambda h: rows(h, lambda row: row._replace(feedback_id="f9") if row.key == "k2" else row),
    "from the comparisons": lambda h: without(h, "c2"),
    "from the feedback topic": lambda h: without(h, "e3"),
    "its retraction, in the database": lambda h: rows(h, lambda row: row._replace(state="ACCEPTED")),
    "its retraction, on the stream": lambda h: without(h, "c3"),
    "not published": lambda h: replace(h, outbox=[r._replace(published=r.id != 4) for r in h.outbox]),
}  # fmt: skip


@pytest.mark.parametrize("plant", LOST.values(), ids=LOST)
def test_a_loss_is_found(plant: Callable[[History], History]) -> None:
    assert check(plant(good())).lost


DOUBLED: dict[str, Callable[[History], History]] = {
    "delivered under another event id": lambda h: replace(
        h, stream=[*h.stream, Delivery(2, C, "p", "c9", "ACCEPTED", ("f2",), "x2", "b2", "a2")]
    ),
    "delivered as another comparison, in an earlier life": lambda h: replace(
        h, stream=[Delivery(1, C, "p", "c9", "ACCEPTED", ("f2",), "x9", "b2", "a2"), *h.stream]
    ),
    "recorded twice": lambda h: replace(h, feedback=[*h.feedback, FeedbackRow("f9", "k2", "ACCEPTED", "x9", 2)]),
    "acknowledged under two ids": lambda h: replace(h, journal=[*h.journal, Acked("k2", "f9")]),
    "told twice": lambda h: replace(h, stream=[*h.stream, told(2, "e9", "RECORDED", "f3")]),
}


@pytest.mark.parametrize("plant", DOUBLED.values(), ids=DOUBLED)
def test_a_double_is_found(plant: Callable[[History], History]) -> None:
    assert check(plant(good())).doubled


def test_a_repeated_event_id_is_no_double() -> None:
    history = good()
    assert check(replace(history, stream=[*history.stream, history.stream[-2]])).holds


REORDERED: dict[str, Callable[[History], History]] = {
    "two votes": lambda h: swapped(h, "e1", "e2"),
    "a retraction before its acceptance": lambda h: swapped(h, "c1", "c3"),
    "in the clients' order": lambda h: replace(
        swapped(without(h, "e1", 1), "e1", "e2"), outbox=[r._replace(id=0) for r in h.outbox]
    ),
}


@pytest.mark.parametrize("plant", REORDERED.values(), ids=REORDERED)
def test_another_order_is_found(plant: Callable[[History], History]) -> None:
    verdict = check(plant(good()))
    assert verdict.reordered
    assert not verdict.lost
    assert not verdict.doubled


WRONG: dict[str, Callable[[History], History]] = {
    "the other response": lambda h: replace(
        h, stream=[d._replace(chosen=d.rejected, rejected=d.chosen) for d in h.stream]
    ),
    "a row that nobody submitted": lambda h: replace(
        h, feedback=[*h.feedback, FeedbackRow("f9", "k9", "RECORDED", "", 1)]
    ),
    "half-written": lambda h: rows(h, lambda row: row._replace(generations=1)),
    "without its event": lambda h: replace(
        h, journal=h.journal[:6], feedback=h.feedback, stream=[d for d in h.stream if "f3" not in d.feedback_ids]
    ),
    "an event without its row": lambda h: replace(
        h, stream=[*h.stream, Delivery(2, C, "p", "c9", "ACCEPTED", ("f9",), "x9", "a", "b")]
    ),
    "a retraction that nobody asked for": lambda h: rows(
        h, lambda row: row._replace(state="RETRACTED") if row.key == "k2" else row
    ),
}


@pytest.mark.parametrize("plant", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_found(plant: Callable[[History], History]) -> None:
    assert check(plant(good())).wrong
