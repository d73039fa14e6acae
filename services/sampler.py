"""Runs inside vLLM's workers: how a CPU draws a token from each row of logits.

vLLM (0.32) draws by the Gumbel-max trick, which takes noise for each token of the vocabulary: a tenth of a step with
sixteen requests of a small model. Inversion takes one uniform number a row, and the distribution is the same. A seeded
request is left to vLLM, so that a seed means here what it means there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn import functional

Forward: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_BLOCK = 128
_BELOW_ONE = 1 - 1e-12


def draw(logits: torch.Tensor) -> torch.Tensor:
    """[rows] A token of each row of `logits` [rows, vocabulary], each with its probability by softmax.

    Inverts the distribution function in two steps, by blocks and within the block that was hit, so that little is added
    up. A token of probability zero is never drawn.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32)
    if over := logits.shape[1] % _BLOCK:
        probabilities = functional.pad(probabilities, (0, _BLOCK - over))
    blocks = probabilities.view(len(logits), -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    point = torch.rand(len(logits), 1, dtype=torch.float64) * ends[:, -1:]
    # The first whose end lies beyond the point, so that it is never an empty one.
    block = torch.searchsorted(ends, point, right=True).clamp(max=blocks.shape[1] - 1)
    begins = functional.pad(ends, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(logits)), block[:, 0]].double().cumsum(-1)
    # Sums of the same numbers in another order differ a little.
    rest = (point - begins).clamp(min=0.0).minimum(inside[:, -1:] * _BELOW_ONE)
    token = block * _BLOCK + torch.searchsorted(inside, rest, right=True)
    return token[:, 0].clamp(max=logits.shape[1] - 1)  # where logits are no numbers


def install(runner: Any) -> None:
    """Lets a model runner draw so, where nothing else was asked for than what `draw` does."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    sampler = runner.sampler.topk_topp_sampler
    if sampler.logprobs_mode == "raw_logprobs" and not sampler.use_fp64_gumbel:
        sampler.forward = partial(forward, seeded=sampler.forward, constrain=apply_top_k_top_p)


def forward(
    logits: torch.Tensor,
    generators: Mapping[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
    *,
    seeded: Forward,
    constrain: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In the place of vLLM's own, which is `seeded` and takes over where a request brings a generator. `constrain`
    leaves the `k` likeliest, or those that come to `p`, and puts the others at minus infinity.
    """
    if generators:
        return seeded(logits, generators, k, p)
    return draw(constrain(logits, k, p)), None
