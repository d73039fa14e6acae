"""Every sample lands in one step and one micro-batch, and a shared prompt changes no number."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trainer.samples import make_demonstrations, make_groups, make_sample, make_samples, make_thumbs, tokens
from trainer import batch, inference, kernels, models
from trainer.samples import Demonstration, Group, Pair, Rollout, Sample

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40)


def samples_of(shapes: list[tuple[int, int, int]]) -> list[Pair]:
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
    assert sorted(row.sample.id for group in groups for row in group) == sorted(s.id for s in samples)
    for group in groups:
        assert len(group) == 1 or len(group) * max(s.tokens for s in group) <= budget
    # Groups do not overlap in length, so no other grouping of the same sizes has less padding.
    for longer, shorter in itertools.pairwise(groups):
        assert min(s.tokens for s in longer) >= max(s.tokens for s in shorter)


@given(shapes=lengths, budget=st.integers(8, 300))
def test_no_cut_of_the_rows_has_less_padding_for_its_micro_batches(
    shapes: list[tuple[int, int, int]], budget: int
) -> None:
    samples = sorted(samples_of(shapes[:8]), key=lambda sample: -sample.tokens)

    def cost(groups: Sequence[Sequence[int]]) -> float:
        if any(len(group) > 1 and len(group) * group[0] > budget for group in groups):
            return math.inf
        return sum(len(group) * group[0] + budget // 8 for group in groups)

    sizes = [sample.tokens for sample in samples]
    found = [[row.tokens for row in group] for group in batch.micro_batches(samples, budget)]
    cuts = itertools.product([False, True], repeat=len(sizes) - 1)
    assert cost(found) == min(cost(_cut(sizes, cut)) for cut in cuts)


def _cut(sizes: Sequence[int], cut: Sequence[bool]) -> list[list[int]]:
    groups = [[sizes[0]]]
    for size, begins in zip(sizes[1:], cut, strict=True):
        if begins:
            groups.append([])
        groups[-1].append(size)
    return groups


@given(shapes=lengths, budget=st.integers(8, 300), ranks=st.integers(1, 5))
def test_ranks_share_the_rows_in_as_many_micro_batches_and_do_none_twice_if_they_need_not(
    shapes: list[tuple[int, int, int]], budget: int, ranks: int
) -> None:
    samples = samples_of(shapes)
    shares = [batch.shared(samples, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = [[group for group, counts in share if counts] for share in shares]
    assert sorted(row.sample.id for groups in counted for group in groups for row in group) == sorted(
        sample.id for sample in samples
    )
    for groups in counted:
        assert all(len(group) == 1 or len(group) * group[0].tokens <= budget for group in groups)
        assert all(group[0].tokens >= row.tokens for group in groups for row in group)
        if len(groups) < len(shares[0]):  # there was nothing to divide
            assert all(len(group) == 1 for group in groups)


def faults(layout: batch.Batch) -> list[batch.Batch]:
    """Two ways to lay out the rejected responses wrongly: numbered on after the chosen ones, and seeing them."""
    numbered_on = torch.arange(layout.input_ids.shape[1]).expand_as(layout.position_ids)
    causal = torch.ones_like(layout.attention_mask).tril()
    return [
        dataclasses.replace(layout, position_ids=numbered_on),
        dataclasses.replace(layout, attention_mask=causal),
    ]


def assert_same(found: Tensor, expected: Tensor, faulty: list[Tensor]) -> None:
    """Norms are computed in float32 whatever the model's type, and a random model makes much of their rounding. What is
    left to that, [2B] values of faulty layouts, chosen and rejected in turn, exceed by far for every rejected response.
    """
    tolerance = 1e-4 * expected.abs() + 1e-3
    assert ((found - expected).abs() <= tolerance).all(), (found, expected)
    for values in faulty:
        assert ((values - expected).abs() > 5 * tolerance)[1::2].all(), (values, expected)


def test_logprobs_with_a_shared_prompt_equal_those_of_plain_full_logits(policy_path: Path) -> None:
    model = models.load_causal(policy_path).double().eval()  # so that only the layout can make a difference
    samples = make_samples(6)
    with torch.no_grad():
        layout = batch.collate(batch.whole(samples))
        shared = models.response_logprobs(model, layout)
        plain = []
        for sample in samples:
            for response in ("chosen", "rejected"):
                ids = torch.tensor([sample.prompt + getattr(sample, response)])
                logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
                chosen = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt) - 1 :]
                plain.append(chosen.sum())
        faulty = [models.response_logprobs(model, fault) for fault in faults(layout)]
    assert_same(shared, torch.stack(plain).float(), faulty)


def test_scores_with_a_shared_prompt_equal_transformers_own(reward_path: Path) -> None:
    model = models.load_scorer(reward_path).double().eval()  # so that only the layout can make a difference
    samples = make_samples(6)
    with torch.no_grad():
        layout = batch.collate(batch.whole(samples))
        shared = models.scores(model, layout)
        plain = [
            model(input_ids=torch.tensor([sample.prompt + getattr(sample, response)])).logits[0, 0]
            for sample in samples
            for response in ("chosen", "rejected")
        ]
        faulty = [models.scores(model, fault) for fault in faults(layout)]
    assert_same(shared, torch.stack(plain).float(), faulty)


def test_logits_exist_for_a_few_positions_at_a_time(policy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_causal(policy_path).float().eval()
    layout = batch.collate(batch.whole(make_samples(6)))
    rows: list[int] = []
    plain = kernels.product

    def noted(hidden: Tensor, weight: Tensor) -> Tensor:
        if weight.shape[-1] == model.config.vocab_size:  # attention's are of other sizes
            rows.append(len(hidden))
        return plain(hidden, weight)

    monkeypatch.setattr(kernels, "product", noted)
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
    layout = batch.collate(batch.whole([sample]))
    assert layout.predictors.tolist() == [3, 4, 3, 6, 7]
    assert layout.targets.tolist() == [*sample.chosen, *sample.rejected]
    assert layout.owners.tolist() == [0, 0, 1, 1, 1]
    assert layout.last_tokens.tolist() == [5, 8]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6]]


ragged = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=12
)


def groups_of(shapes: list[tuple[int, list[int]]]) -> list[Group]:
    rng = random.Random(0)
    return [
        Group(
            id=f"{number:03d}",
            prompt=tokens(rng, prompt),
            rollouts=tuple(Rollout(tokens(rng, length), 0.0) for length in responses),
        )
        for number, (prompt, responses) in enumerate(shapes)
    ]


@given(shapes=ragged, budget=st.integers(1, 200))
def test_rollouts_are_spread_over_rows_each_once_and_in_order(shapes: list[tuple[int, list[int]]], budget: int) -> None:
    samples = groups_of(shapes)
    found = batch.micro_batches(samples, budget)
    for group in found:
        assert len(group) == 1 or len(group) * max(row.tokens for row in group) <= budget
    for sample in samples:
        rows = sorted((row for group in found for row in group if row.sample is sample), key=lambda row: row.first)
        assert tuple(response for row in rows for response in row.responses) == sample.responses
        assert all(row.tokens <= budget or len(row.responses) == 1 for row in rows)
        # What goes with the tokens is divided as the responses are.
        spans = [row.span for row in rows]
        assert (spans[0].start, spans[-1].stop) == (0, sample.response_tokens)
        assert all(before.stop == after.start for before, after in itertools.pairwise(spans))
        # As few as can be: the first response of a row did not fit into the row before.
        for before, after in itertools.pairwise(rows):
            assert before.tokens + len(after.responses[0]) > budget


@given(shapes=ragged, budget=st.integers(1, 200))
def test_what_is_given_goes_with_its_token(shapes: list[tuple[int, list[int]]], budget: int) -> None:
    samples = groups_of(shapes)
    # Every response token's own id stands for what is known of it.
    given = {"own": {s.id: torch.tensor([token for r in s.responses for token in r]).float() for s in samples}}
    for rows in batch.micro_batches(samples, budget):
        layout = batch.collate(rows, given)
        assert layout.given["own"].tolist() == layout.targets.tolist()
        sums = [float(sum(response)) for row in rows for response in row.responses]
        assert layout.sums(layout.given["own"]).tolist() == sums
        assert layout.lengths.tolist() == [len(response) for row in rows for response in row.responses]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_logprobs_and_values_of_every_layout_equal_those_of_plain_sequences(
    budget: int, policy_path: Path, reward_path: Path
) -> None:
    """One response a row, several, or all: padding, packing and prompt sharing change no number."""
    model = models.load_causal(policy_path).double().eval()
    critic = models.load_scorer(reward_path).double().eval()
    samples: list[Sample] = [*make_groups(3), *make_thumbs(3), *make_demonstrations(2), *make_samples(2)]

    def asked(function: Callable[[Any, batch.Batch], Tensor], of: Any) -> dict[str, Tensor]:
        return inference.per_token(
            lambda layout: function(of, layout),
            samples,
            device=torch.device("cpu"),
            max_tokens=budget,
            stop=lambda: False,
        )

    found, values = asked(models.response_token_logprobs, model), asked(models.values, critic)
    for sample in samples:
        plain, states = [], []
        for response in sample.responses:
            ids = torch.tensor([sample.prompt + response])
            span = slice(len(sample.prompt) - 1, -1)
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, span]
                states += critic.score(critic.model(input_ids=ids).last_hidden_state)[0, span, 0].tolist()
            plain += logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
        assert found[sample.id].tolist() == pytest.approx(plain, rel=1e-4, abs=1e-3)
        assert values[sample.id].tolist() == pytest.approx(states, rel=1e-4, abs=1e-3)


@given(pairs=st.integers(0, 9), demonstrations=st.integers(0, 9), size=st.integers(1, 6))
def test_kinds_are_spread_evenly_over_steps(pairs: int, demonstrations: int, size: int) -> None:
    samples: list[Sample] = [*make_samples(pairs), *make_demonstrations(demonstrations)]
    steps = batch.steps(samples, size, seed=0, round_number=1, epoch=0)
    assert sorted(s.id for step in steps for s in step) == sorted(s.id for s in samples)
    shares = [sum(isinstance(s, Demonstration) for s in step) for step in steps]
    for step, share in zip(steps, shares, strict=True):
        assert len(step) <= size
        assert abs(share - len(step) * demonstrations / len(samples)) < 1.5
