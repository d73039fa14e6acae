"""Tokens drawn from logits: with the probabilities that softmax says, and only those that can be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from services import sampler

DRAWS = 40_000


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_those_of_softmax(vocabulary: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(vocabulary)
    counts = torch.bincount(sampler.draw(logits.expand(DRAWS, -1)), minlength=vocabulary).double()
    expected = DRAWS * logits.double().softmax(-1)
    often = expected >= 5  # the others together are one cell more
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    some = wanted > 0
    # Pearson's statistic, whose mean is its degrees of freedom, and its variance twice them.
    statistic = ((observed[some] - wanted[some]) ** 2 / wanted[some]).sum()
    degrees = int(some.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_what_cannot_be_is_never_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.full((DRAWS, 300), -torch.inf)
    logits[:, [0, 127, 128, 131, 299]] = 0.0
    assert set(sampler.draw(logits).tolist()) == {0, 127, 128, 131, 299}


@pytest.mark.parametrize("token", [0, 127, 128, 299])
def test_the_only_one_that_can_be_is_drawn(token: int) -> None:
    logits = torch.full((1000, 300), -torch.inf)
    logits[:, token] = -20.0
    assert (sampler.draw(logits) == token).all()


def test_each_row_has_its_own_draw() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(4000, 256)
    logits[:2000, 128:] = -torch.inf
    logits[2000:, :128] = -torch.inf
    drawn = sampler.draw(logits)
    assert drawn[:2000].max() < 128
    assert drawn[2000:].min() >= 128
    assert len(set(drawn[:2000].tolist())) == 128


def test_logits_that_are_no_numbers_give_a_token_nevertheless() -> None:
    drawn = sampler.draw(torch.full((3, 300), torch.nan))
    assert ((drawn >= 0) & (drawn < 300)).all()


def likeliest(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Leaves the `k` likeliest, as vLLM's own does."""
    if k is None:
        return logits
    least = logits.topk(int(k[0])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def seven(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
    """Stands for vLLM's own drawing."""
    return torch.full((len(logits),), 7), None


def test_seeded_requests_are_left_to_vllm() -> None:
    logits = torch.zeros(2, 300)
    logits[:, 9] = 100.0
    draw = partial(sampler.forward, seeded=seven, constrain=likeliest)
    assert draw(logits, {0: torch.Generator()}, None, None)[0].tolist() == [7, 7]
    assert draw(logits, {}, None, None)[0].tolist() == [9, 9]


def test_no_more_than_k_are_drawn_from() -> None:
    torch.manual_seed(0)
    logits = torch.randn(300).expand(2000, -1)
    k = torch.full((2000,), 3)
    drawn, _ = sampler.forward(logits, {}, k, None, seeded=seven, constrain=likeliest)
    assert set(drawn.tolist()) == set(logits[0].topk(3).indices.tolist())
