"""What is read out of a version's numbers."""

from __future__ import annotations

import math
import statistics

import pytest

from services.reward.reading import Reading
from thumbwheel import errors
from thumbwheel.heads import Heads
from thumbwheel.v1.reward_pb2 import CompareResponse

HEADS = Heads(("helpfulness",), 3)
READING = Reading(HEADS, temperature=2.0)
A, B = [1.5, 0.5, 1.0, 2.0, 1.2], [0.5, -0.5, 1.0, 0.0, 1.0]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_score_by_itself_and_over_the_reference() -> None:
    score = READING.score(A, None, 7)
    assert (score.score, score.tokens, dict(score.aspects)) == (1.5, 7, {"helpfulness": 0.5})
    assert score.uncertainty == pytest.approx(statistics.stdev([1.0, 2.0, 1.2]))
    assert not score.HasField("score_over_reference")
    over = READING.score(A, B, 7)
    assert over.score_over_reference == 1.0
    assert over.uncertainty == pytest.approx(statistics.stdev([0.0, 2.0, 0.2]))


def test_probabilities_are_of_differences_over_the_temperature() -> None:
    response = CompareResponse()
    READING.compare(A, B, response)
    assert response.probability_a == pytest.approx(sigmoid(0.5))
    assert response.uncertainty == pytest.approx(statistics.stdev(map(sigmoid, [0.0, 1.0, 0.1])))
    assert response.aspects["helpfulness"] == pytest.approx(sigmoid(0.5))


def test_a_single_head_has_no_uncertainty_and_no_score_overflows() -> None:
    alone, response = Reading(Heads.named(["LABEL_0"]), 1.0), CompareResponse()
    assert not alone.score([3.0], None, 1).HasField("uncertainty")
    alone.compare([-1e4], [1e4], response)
    assert response.probability_a == pytest.approx(0.0)
    assert not response.HasField("uncertainty")


def test_heads_have_names_of_their_own() -> None:
    assert Heads.of(dict(enumerate(HEADS.names))) == HEADS
    for aspects in (("overall",), ("a", "a"), ("ensemble-0",)):
        with pytest.raises(errors.InvalidArgument, match="Name each once"):
            Heads(aspects)
