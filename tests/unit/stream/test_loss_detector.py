from __future__ import annotations

from thumbwheel.stream.log import LossDetector, Position


def test_rising_offsets_are_no_loss_whatever_their_partition() -> None:
    detector = LossDetector()
    positions = [("t", 0, 5), ("t", 1, 0), ("u", 0, 0), ("t", 0, 6), ("t", 1, 3), ("t", 0, 9)]
    assert not any(detector.acked(Position(*each)) for each in positions)


def test_an_offset_that_does_not_rise_is_a_loss_once() -> None:
    detector = LossDetector()
    offsets = [7, 8, 0, 1, 2, 2, 3]
    assert [detector.acked(Position("t", 0, offset)) for offset in offsets] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_another_id_is_a_loss_once() -> None:
    detector = LossDetector()
    assert not detector.seen({"t": "a", "u": "x"})
    assert not detector.seen({"t": "a"})
    assert not detector.seen({})  # gone for the moment
    assert detector.seen({"t": "b", "u": "x"})
    assert not detector.seen({"t": "b", "u": "x"})
    assert detector.topic_ids == {"t": "b", "u": "x"}


def test_a_loss_between_two_runs_is_seen_from_the_ids_kept() -> None:
    first = LossDetector()
    first.seen({"t": "a"})
    assert not LossDetector(first.topic_ids).seen({"t": "a"})
    assert LossDetector(first.topic_ids).seen({"t": "b"})


def test_a_loss_seen_by_its_id_is_not_reported_again_by_its_offsets() -> None:
    detector = LossDetector({"t": "a", "u": "x"})
    detector.acked(Position("t", 0, 7))
    detector.acked(Position("u", 0, 7))
    assert detector.seen({"t": "b", "u": "x"})
    assert not detector.acked(Position("t", 0, 0))
    assert detector.acked(Position("u", 0, 0))
