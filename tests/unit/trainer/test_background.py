"""Work goes on in order, and what fails is heard."""

from __future__ import annotations

import threading

import pytest

from trainer.background import Background


def test_work_goes_on_in_order_beside_the_caller() -> None:
    background, go, done = Background("test"), threading.Event(), list[int]()

    def first() -> None:
        go.wait(10.0)
        done.append(1)

    background.submit(first)
    background.submit(lambda: done.append(2))
    assert done == []
    go.set()
    background.wait()
    assert done == [1, 2]
    background.close()


def test_a_failure_is_raised_at_the_next_call_and_nothing_is_done_after_it() -> None:
    background, go, done = Background("test"), threading.Event(), list[int]()

    def fail() -> None:
        go.wait(10.0)
        raise ValueError("the disk is full")

    background.submit(fail)
    background.submit(lambda: done.append(1))
    go.set()
    with pytest.raises(ValueError, match="the disk is full"):
        background.wait()
    with pytest.raises(ValueError, match="the disk is full"):
        background.check()
    with pytest.raises(ValueError, match="the disk is full"):
        background.close()
    assert done == []
