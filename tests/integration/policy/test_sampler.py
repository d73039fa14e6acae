"""vLLM's own sampler with our way of drawing in it: its probabilities, and its tokens where there is a seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services import sampler

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's, which is imported into this process here

DRAWS, VOCABULARY = 20_000, 300


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """vLLM's sampler as it comes, and one that ours was put into."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()  # as its workers do
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    theirs, ours = TopKTopPSampler(), TopKTopPSampler()
    sampler.install(SimpleNamespace(sampler=SimpleNamespace(topk_topp_sampler=ours)))
    return theirs, ours


@pytest.mark.parametrize(("k", "p"), [(None, None), (5, None), (None, 0.6), (20, 0.8)])
def test_tokens_come_as_often_as_from_vllm_s(pair: tuple[Any, Any], k: int | None, p: float | None) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(VOCABULARY)).expand(DRAWS, -1)
    ks = None if k is None else torch.full((DRAWS,), k, dtype=torch.int32)
    ps = None if p is None else torch.full((DRAWS,), p)
    theirs, ours = (
        torch.bincount(one.forward(logits.clone(), {}, ks, ps)[0].long(), minlength=VOCABULARY).double() for one in pair
    )
    both = theirs + ours
    often = both >= 10
    # Two samples of one size and one distribution: mean and variance are those of chi-square.
    statistic = ((theirs - ours)[often] ** 2 / both[often]).sum()
    degrees = int(often.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    if k is not None:
        assert (ours > 0).sum() <= k


def test_a_seed_means_what_it_means_in_vllm(pair: tuple[Any, Any]) -> None:
    logits = torch.randn(4, VOCABULARY)
    drawn = []
    for one in pair:
        torch.manual_seed(0)
        generators = {row: torch.Generator().manual_seed(row) for row in range(4)}
        drawn.append([one.forward(logits.clone(), generators, None, None)[0].tolist() for _ in range(20)])
    assert drawn[0] == drawn[1]


def test_without_a_seed_it_is_ours_that_draws(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "draw", lambda logits: torch.full((len(logits),), 11))
    assert pair[1].forward(torch.randn(3, VOCABULARY), {}, None, None)[0].tolist() == [11, 11, 11]
