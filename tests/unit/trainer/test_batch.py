"""Every sample lands in one step and one micro-batch, and a shared prompt changes no number."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trainer.samples import make_sample, make_samples
from trainer import batch, models
from trainer.buffer import Sample

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40)


def samples_of(shapes: list[tuple[int, int, int]]) -> list[Sample]:
    rng = random.Random(0)
    return [make_sample(rng, prompt=p, chosen=c, rejected=r) for p, c, r in shapes]


@given(shapes=lengths, size=st.integers(1, 9), round_number=st.integers(0, 3))
def test_steps_hold_every_sample_once_and_are_even(
    shapes: list[tuple[int, int, int]], size: int, round_number: int
) -> None:
    samples = samples_of(shapes)
    steps = batch.steps(samples, size, seed=1, round_number=round_number, epoch=0)
    assert sorted(s.id for step in steps for s in step) == sorted(s.id for s in samples)
    sizes = [len(step) for step in steps]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(steps) == -(-len(samples) // size)
    shuffled = random.Random(2).sample(samples, len(samples))
    assert batch.steps(shuffled, size, seed=1, round_number=round_number, epoch=0) == steps


def test_the_order_differs_between_rounds_epochs_and_seeds() -> None:
    samples = make_samples(24)
    orders = {
        tuple(s.id for step in batch.steps(samples, 8, seed=seed, round_number=number, epoch=epoch) for s in step)
        for seed, number, epoch in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))
    }
    assert len(orders) == 4


@given(shapes=lengths, budget=st.integers(1, 300))
def test_micro_batches_keep_the_budget_and_put_like_lengths_together(
    shapes: list[tuple[int, int, int]], budget: int
) -> None:
    samples = samples_of(shapes)
    groups = batch.micro_batches(samples, budget)
    assert sorted(s.id for group in groups for s in group) == sorted(s.id for s in samples)
    for group in groups:
        assert len(group) == 1 or len(group) * max(s.tokens for s in group) <= budget
    # Groups do not overlap in length, so no other grouping of the same sizes has less padding.
    for longer, shorter in itertools.pairwise(groups):
        assert min(s.tokens for s in longer) >= max(s.tokens for s in shorter)


def faults(layout: batch.PairBatch) -> list[batch.PairBatch]:
    """Two ways to lay out the rejected responses wrongly: numbered on after the chosen ones, and seeing them."""
    numbered_on = torch.arange(layout.input_ids.shape[1]).expand_as(layout.position_ids)
    causal = torch.ones_like(layout.attention_mask).tril()
    return [
        dataclasses.replace(layout, position_ids=numbered_on),
        dataclasses.replace(layout, attention_mask=causal),
    ]


def assert_same(found: Tensor, expected: Tensor, faulty: list[Tensor]) -> None:
    """Norms are computed in float32 whatever the model's type, and a random model makes much of their rounding. What is
    left to that, [2B] values of faulty layouts exceed by far for every rejected response.
    """
    tolerance = 1e-4 * expected.abs() + 1e-3
    assert ((found - expected).abs() <= tolerance).all(), (found, expected)
    rejected = slice(len(expected) // 2, None)
    for values in faulty:
        assert ((values - expected).abs() > 5 * tolerance)[rejected].all(), (values, expected)


def test_logprobs_with_a_shared_prompt_equal_those_of_plain_full_logits(policy_path: Path) -> None:
    model = models.load_causal(policy_path).double().eval()  # so that only the layout can make a difference
    samples = make_samples(6)
    with torch.no_grad():
        layout = batch.collate(samples)
        shared = models.response_logprobs(model, layout)
        plain = []
        for response in ("chosen", "rejected"):
            for sample in samples:
                tokens = torch.tensor([sample.prompt + getattr(sample, response)])
                logprobs = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1]
                chosen = logprobs.gather(1, tokens[0, 1:, None])[len(sample.prompt) - 1 :]
                plain.append(chosen.sum())
        faulty = [models.response_logprobs(model, fault) for fault in faults(layout)]
    assert_same(shared, torch.stack(plain).float(), faulty)


def test_scores_with_a_shared_prompt_equal_transformers_own(reward_path: Path) -> None:
    model = models.load_scorer(reward_path).double().eval()  # so that only the layout can make a difference
    samples = make_samples(6)
    with torch.no_grad():
        layout = batch.collate(samples)
        shared = models.scores(model, layout)
        plain = [
            model(input_ids=torch.tensor([sample.prompt + getattr(sample, response)])).logits[0, 0]
            for response in ("chosen", "rejected")
            for sample in samples
        ]
        faulty = [models.scores(model, fault) for fault in faults(layout)]
    assert_same(shared, torch.stack(plain).float(), faulty)


def test_logits_exist_for_a_few_positions_at_a_time(policy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_causal(policy_path).float().eval()
    layout = batch.collate(make_samples(6))
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    with torch.no_grad():
        whole = models.response_logprobs(model, layout)
        monkeypatch.setattr(models, "LOGIT_ROWS", 7)
        rows.clear()
        parts = models.response_logprobs(model, layout)
    assert max(rows) == 7
    assert sum(rows) == len(layout.targets) == sum(len(s.chosen) + len(s.rejected) for s in make_samples(6))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-5)


def test_the_first_token_of_both_responses_is_predicted_by_the_prompt() -> None:
    sample = make_sample(random.Random(0), prompt=4, chosen=2, rejected=3)
    layout = batch.collate([sample])
    assert layout.predictors.tolist() == [3, 4, 3, 6, 7]
    assert layout.targets.tolist() == [*sample.chosen, *sample.rejected]
    assert layout.owners.tolist() == [0, 0, 1, 1, 1]
    assert layout.last_tokens.tolist() == [5, 8]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6]]
