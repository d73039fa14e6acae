"""What is written out by hand says what autograd says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import kernels, models


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_logprobs_and_their_gradients_are_those_of_the_plain_formula(rows: int) -> None:
    hidden, weight, targets = random(7, 5, seed=0), random(11, 5, seed=1), torch.arange(7) % 3
    weights = torch.linspace(-1, 2, 7)
    found = kernels.token_logprobs(hidden, weight, targets, rows=rows)
    plain = (hidden @ weight.t()).log_softmax(1)[torch.arange(7), targets]
    torch.testing.assert_close(found, plain.float())
    ours = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    theirs = torch.autograd.grad((plain * weights).sum(), (hidden, weight))
    for our, their in zip(ours, theirs, strict=True):
        # The softmax is worked out in float32, whatever the model's type.
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_a_head_with_a_bias_or_of_another_kind_is_asked_itself() -> None:
    hidden, targets = random(4, 5, seed=0).float(), torch.tensor([0, 1, 2, 0])
    head = torch.nn.Linear(5, 3)
    found = models.token_logprobs(head, hidden, targets)
    torch.testing.assert_close(found, head(hidden).log_softmax(1)[torch.arange(4), targets])


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_and_its_gradients_are_those_of_torch(heads: int, key_heads: int) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    query, key, value = (random(2, count, 9, 4, seed=n) for n, count in enumerate((heads, key_heads, key_heads)))
    mask = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, 0, 5:, 1:3] = False  # as where responses share a prompt
    found, _ = kernels.attention(module, query, key, value, mask)
    groups = heads // key_heads
    wide_key, wide_value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    plain = scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found, plain)
    weights = random(*plain.shape, seed=9)
    ours = torch.autograd.grad((found * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((plain * weights).sum(), (query, key, value))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_without_a_mask_torchs_own_attention_does_it() -> None:
    module = torch.nn.Module()
    query, key, value = (random(1, 2, 5, 4, seed=n) for n in range(3))
    found, _ = kernels.attention(module, query, key, value, None, is_causal=True)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, plain)


def bf16(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed).detach().bfloat16().requires_grad_()


@pytest.fixture
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bf16."""
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: False)


def adopted(*, bias: bool) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """A layer that computes in its own way, and the same layer in float64."""
    torch.manual_seed(4)
    mine = torch.nn.Linear(48, 20, bias=bias, dtype=torch.bfloat16)
    plain = copy.deepcopy(mine).double()
    kernels.adopt(mine)
    return mine, plain


@pytest.mark.usefixtures("no_bf16")
@pytest.mark.parametrize("bias", [False, True])
def test_without_bf16_instructions_a_layer_says_the_same_rounded_once(*, bias: bool) -> None:
    given, (mine, plain) = bf16(2, 7, 48, seed=0), adopted(bias=bias)
    wide, weights = given.detach().double().requires_grad_(), bf16(2, 7, 20, seed=5).detach()
    found, expected = mine(given), plain(wide)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-8, atol=1e-6)
    ours = torch.autograd.grad((found * weights).sum(), (given, *mine.parameters()))
    theirs = torch.autograd.grad((expected * weights.double()).sum(), (wide, *plain.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.bfloat16
        torch.testing.assert_close(our, their.bfloat16(), rtol=2**-7, atol=1e-2)


@pytest.mark.usefixtures("no_bf16")
def test_without_bf16_instructions_nothing_is_multiplied_in_bf16() -> None:
    """Not forwards, and not backwards."""
    query, key, value = bf16(1, 4, 6, 8, seed=0), bf16(1, 2, 6, 8, seed=1), bf16(1, 2, 6, 8, seed=2)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mine, _ = adopted(bias=True)
    with Products() as seen:
        attended, _ = kernels.attention(torch.nn.Module(), query, key, value, mask)
        torch.autograd.grad(attended.sum(), (query, key, value))
        torch.autograd.grad(mine(given := bf16(5, 48, seed=3)).sum(), (given, *mine.parameters()))
        hidden, head = bf16(5, 8, seed=4), bf16(11, 8, seed=5)
        logprobs = kernels.token_logprobs(hidden, head, torch.arange(5), rows=3)
        torch.autograd.grad(logprobs.sum(), (hidden, head))
    assert seen.types == {torch.float32}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Notes the types of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.types.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_where_there_are_such_instructions_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: True)
    mine, _ = adopted(bias=False)
    assert "forward" not in vars(mine)
