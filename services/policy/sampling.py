"""Sampling parameters: checked by field, defaults filled in, and as vLLM takes them."""

from __future__ import annotations

import json
import math
from typing import Any

from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import SamplingParams, StructuredOutput

DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 256,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_RANGES: dict[str, tuple[float, float, bool]] = {  # least, most, whether the least itself is out
    "temperature": (0.0, 2.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 2.0, True),
}
MAX_STOPS = 16
MAX_BAD_WORDS = 16
MAX_LOGPROBS = 20
MAX_SCHEMA_BYTES = 65_536
MAX_REGEX_BYTES = 4_096
MAX_CHOICES = 64


def resolve(given: SamplingParams, *, max_tokens: int, vocab_size: int) -> SamplingParams:
    """A copy with every default filled in. Raises `errors.InvalidArgument` naming the field that is out of range.

    `max_tokens` is the server's limit: a request that does not say gets the default, or the limit if that is less.
    """
    params = SamplingParams()
    params.CopyFrom(given)
    for name, default in DEFAULTS.items():
        if not params.HasField(name):  # type: ignore[arg-type]  # the stubs want a literal; the keys above are fields
            setattr(params, name, min(default, max_tokens) if name == "max_tokens" else default)
    for name, (low, high, open_below) in _RANGES.items():
        value = getattr(params, name)
        if not math.isfinite(value) or value > high or value < low or (open_below and value == low):
            raise errors.InvalidArgument(
                f"is {value:g}; it must be {'above' if open_below else 'from'} {low:g} to {high:g}.",
                field=f"sampling.{name}",
            )
    if not 1 <= params.max_tokens <= max_tokens:
        raise errors.InvalidArgument(
            f"is {params.max_tokens}; it must be from 1 to {max_tokens}.", field="sampling.max_tokens"
        )
    if params.min_tokens > params.max_tokens:
        raise errors.InvalidArgument(
            f"is {params.min_tokens}, more than max_tokens ({params.max_tokens}).", field="sampling.min_tokens"
        )
    if len(params.stop) > MAX_STOPS or not all(params.stop):
        raise errors.InvalidArgument(f"takes up to {MAX_STOPS} strings, none empty.", field="sampling.stop")
    if any(token >= vocab_size for token in params.stop_token_ids):
        raise errors.InvalidArgument(
            f"has an id beyond the vocabulary of {vocab_size}.", field="sampling.stop_token_ids"
        )
    if params.HasField("seed") and params.seed < 0:
        raise errors.InvalidArgument(f"is {params.seed}; it must be 0 or above.", field="sampling.seed")
    for name in ("top_logprobs", "prompt_logprobs"):
        if (count := getattr(params, name)) > MAX_LOGPROBS:
            raise errors.InvalidArgument(f"is {count}; at most {MAX_LOGPROBS} are told.", field=f"sampling.{name}")
    if len(params.bad_words) > MAX_BAD_WORDS or not all(word.strip() for word in params.bad_words):
        raise errors.InvalidArgument(f"takes up to {MAX_BAD_WORDS} words, none empty.", field="sampling.bad_words")
    if params.HasField("structured_output"):
        _check_form(params.structured_output)
    return params


def _check_form(form: StructuredOutput) -> None:
    """What can be said of a form without compiling it; the engine says the rest when it does."""
    field = "sampling.structured_output"
    kind = form.WhichOneof("form")
    if kind is None:
        raise errors.InvalidArgument(
            "is empty.", field=field, remedy="Set json_schema, regex or choices, or leave it out."
        )
    if kind == "json_schema":
        if len(form.json_schema.encode()) > MAX_SCHEMA_BYTES:
            raise errors.InvalidArgument(f"is over {MAX_SCHEMA_BYTES} bytes.", field=f"{field}.json_schema")
        try:
            schema = json.loads(form.json_schema)
        except (ValueError, RecursionError) as error:
            raise errors.InvalidArgument(f"is not JSON: {error}.", field=f"{field}.json_schema") from error
        if not isinstance(schema, dict):
            raise errors.InvalidArgument("is JSON, but not an object.", field=f"{field}.json_schema")
    elif kind == "regex":
        if not form.regex or len(form.regex.encode()) > MAX_REGEX_BYTES:
            raise errors.InvalidArgument(f"must have 1 to {MAX_REGEX_BYTES} bytes.", field=f"{field}.regex")
    elif not 1 <= len(form.choices.texts) <= MAX_CHOICES or not all(form.choices.texts):
        raise errors.InvalidArgument(f"takes 1 to {MAX_CHOICES} texts, none empty.", field=f"{field}.choices")


def refused(error: Exception, params: SamplingParams) -> errors.InvalidArgument:
    """What vLLM found wrong with a request that `resolve` let through, by field."""
    name = getattr(error, "parameter", None)
    if not isinstance(name, str) or name not in params.DESCRIPTOR.fields_by_name:
        name = "structured_output" if params.HasField("structured_output") else ""
    return errors.InvalidArgument(
        f"is refused by the engine: {str(error.args[0]).strip()}", field=f"sampling.{name}".rstrip(".")
    )


def to_vllm(params: SamplingParams, *, stream: bool, seed_offset: int = 0) -> Any:
    """The `vllm.SamplingParams` of resolved parameters; asks for the log-probability of each sampled token.

    With a seed, candidate i of a request is drawn with seed + i.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    form: Any = None
    if params.HasField("structured_output"):
        given = params.structured_output
        kind = given.WhichOneof("form")
        form = StructuredOutputsParams(
            json=given.json_schema if kind == "json_schema" else None,
            regex=given.regex if kind == "regex" else None,
            choice=list(given.choices.texts) if kind == "choices" else None,
        )
    return vllm.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop=list(params.stop) or None,
        stop_token_ids=list(params.stop_token_ids) or None,
        seed=params.seed + seed_offset if params.HasField("seed") else None,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        ignore_eos=params.ignore_eos,
        logprobs=params.top_logprobs,  # the sampled token's own is always among them
        flat_logprobs=True,  # lists of numbers instead of an object a token
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        bad_words=list(params.bad_words) or None,
        structured_outputs=form,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )
