"""Operations written out, because autograd's own take twice the time on a CPU or more. Their results are the plain
ones.

Attention with a mask: torch's fused kernel is slow backwards and repeats the keys of grouped queries. The probabilities
are kept instead of computed again, [B, H, L, L] in the model's type.

Log-probabilities of given tokens: the softmax over the vocabulary is kept in the model's type, so that the product with
the head's matrix is not done again, and the gradient of the logits is made of it in one pass.

Products of bf16: in fp32, and rounded, where the processor has no instructions for bf16. Those that have them add up in
fp32 as well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ATTENTION = "thumbwheel"
"""The name of `attention` among those of Transformers."""


@functools.cache
def multiplies_bf16() -> bool:
    """Whether torch multiplies matrices of bf16 by instructions of this processor, such as AVX-512's. Without them it
    takes them number by number, many times slower than in fp32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _slow(given: Tensor) -> bool:
    return given.dtype == torch.bfloat16 and given.device.type == "cpu" and not multiplies_bf16()


def product(first: Tensor, second: Tensor) -> Tensor:
    """The matrix product, or that of each of a batch, in the type of `first`."""
    return (first.float() @ second.float()).to(first.dtype) if _slow(first) else first @ second


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(given, weight)
        found = linear(given.float(), weight.float(), None if bias is None else bias.float())
        return found.to(given.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        given, weight = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        of_given, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradients[0], weight) if of_given else None,
            product(rows.t(), given.flatten(0, -2)) if of_weight else None,
            rows.float().sum(0).to(rows.dtype) if of_bias else None,
        )


def _forward(layer: torch.nn.Linear, given: Tensor) -> Tensor:
    if not _slow(given):
        return linear(given, layer.weight, layer.bias)
    made: Tensor = _Linear.apply(given, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return made


def adopt(model: torch.nn.Module) -> None:
    """Has the linear layers of a model compute in fp32 what this processor is slow at in bf16."""
    if multiplies_bf16():
        return
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        found, kept = [], []
        wanted = any(ctx.needs_input_grad)
        for part, wanted_tokens in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logprobs = torch.log_softmax(product(part, weight.t()), 1, dtype=torch.float32)
            found.append(logprobs.gather(1, wanted_tokens[:, None]).squeeze(1))
            if wanted:
                kept.append(logprobs.exp_().to(hidden.dtype))
        if wanted:
            ctx.save_for_backward(hidden, weight, targets, *kept)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, *kept = ctx.saved_tensors
        gradient = gradients[0].to(hidden.dtype)
        # d log p(target) / d logits = onehot(target) − p
        logits = torch.cat(kept).mul_(-gradient[:, None])
        rows = torch.arange(len(targets), device=targets.device)
        logits[rows, targets] += gradient
        return product(logits, weight), product(logits.t(), hidden), None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int) -> Tensor:
    """[N] log-probabilities, in float32, of `targets` [N] by the logits `hidden` [N, H] times `weight` [V, H]; `rows`
    rows of logits exist at a time in float32.
    """
    found: Tensor = _TokenLogprobs.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        count, heads, length, size = query.shape
        grouped = (count * key.shape[1], heads // key.shape[1] * length, size)  # queries that share a key lie together
        q, k, v = query.reshape(grouped), key.flatten(0, 1), value.flatten(0, 1)
        scores = product(q, k.transpose(1, 2)).mul_(scale)
        scores.view(count, heads, length, length).masked_fill_(~mask, -torch.inf)
        probabilities = torch.softmax(scores, 2)
        del scores
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.shapes = query.shape, key.shape, scale
        return product(probabilities, v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, probabilities = ctx.saved_tensors
        query_shape, key_shape, scale = ctx.shapes
        gradient = gradients[0].reshape(q.shape)
        value = product(probabilities.transpose(1, 2), gradient)
        of_probabilities = product(gradient, v.transpose(1, 2))
        scores = torch._softmax_backward_data(of_probabilities, probabilities, 2, probabilities.dtype)
        query, key = product(scores, k).mul_(scale), product(scores.transpose(1, 2), q).mul_(scale)
        return query.view(query_shape), key.view(key_shape), value.view(key_shape), None, None


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """[B, L, H, D] attention, as Transformers wants it, of query [B, H, L, D], key and value [B, K, L, D]. `mask` is
    [B, 1, L, L], true where a query may see a key; without one torch's own does it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is None or mask.dtype != torch.bool or query.shape[2] != key.shape[2]:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
        return found
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    made: Tensor = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return made.transpose(1, 2).contiguous(), None


def register() -> str:
    """Makes `attention` known to Transformers, once; returns the name to load models with on this machine."""
    if torch.cuda.is_available():
        return "sdpa"  # there the fused kernels are the fast ones
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION
