"""Sampling parameters: checked by field, defaults filled in, and as vLLM takes them."""

from __future__ import annotations

import math
from typing import Any

from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import SamplingParams

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
    return params


def to_vllm(params: SamplingParams, *, stream: bool, seed_offset: int = 0) -> Any:
    """The `vllm.SamplingParams` of resolved parameters; asks for the log-probability of each sampled token.

    With a seed, candidate i of a request is drawn with seed + i.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

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
        logprobs=0,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )
