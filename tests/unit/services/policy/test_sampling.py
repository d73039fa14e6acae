"""Sampling parameters: every way of getting them wrong is named by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.policy import sampling
from thumbwheel import errors
from thumbwheel.v1 import policy_pb2 as pb


def _resolve(given: dict[str, Any]) -> pb.SamplingParams:
    return sampling.resolve(pb.SamplingParams(**given), max_tokens=100, vocab_size=320)


def _form(**form: Any) -> dict[str, Any]:
    return {"structured_output": pb.StructuredOutput(**form)}


FORM = "sampling.structured_output"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"seed": -1}, "sampling.seed"),
        ({"top_logprobs": 21}, "sampling.top_logprobs"),
        ({"prompt_logprobs": 21}, "sampling.prompt_logprobs"),
        ({"bad_words": ["fine", "  "]}, "sampling.bad_words"),
        ({"bad_words": ["w"] * 17}, "sampling.bad_words"),
        ({"stop": ["s"] * 17}, "sampling.stop"),
        (_form(), FORM),
        (_form(json_schema="{"), f"{FORM}.json_schema"),
        (_form(json_schema="[" * 60_000), f"{FORM}.json_schema"),
        (_form(json_schema="3"), f"{FORM}.json_schema"),
        (_form(json_schema=json.dumps({"title": "x" * 70_000})), f"{FORM}.json_schema"),
        (_form(regex=""), f"{FORM}.regex"),
        (_form(regex="a" * 5_000), f"{FORM}.regex"),
        (_form(choices=pb.Choices()), f"{FORM}.choices"),
        (_form(choices=pb.Choices(texts=["yes", ""])), f"{FORM}.choices"),
        (_form(choices=pb.Choices(texts=["x"] * 65)), f"{FORM}.choices"),
    ],
)
def test_bad_input_names_the_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        _resolve(given)
    assert caught.value.field == field
    assert caught.value.message


def test_good_input_is_kept_and_defaults_filled_in() -> None:
    given = {"top_logprobs": 20, "seed": 0, "bad_words": ["no"], **_form(regex="a+")}
    params = _resolve(given)
    assert params.top_logprobs == 20
    assert params.seed == 0
    assert params.structured_output.regex == "a+"
    assert not params.HasField("prompt_logprobs")
    assert params.max_tokens == 100
    assert params.top_p == 1.0


def test_what_the_engine_refuses_is_named_too() -> None:
    class Refusal(ValueError):
        parameter = "bad_words"

    structured = pb.SamplingParams(structured_output=pb.StructuredOutput(regex="("))
    assert sampling.refused(Refusal("no"), pb.SamplingParams()).field == "sampling.bad_words"
    assert sampling.refused(ValueError("no"), structured).field == FORM
    assert sampling.refused(ValueError("no"), pb.SamplingParams()).field == "sampling"
