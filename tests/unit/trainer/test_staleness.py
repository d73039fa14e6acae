"""What is stale counts less, within bounds; what is too stale is dropped and counted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.samples import make_groups, make_samples
from thumbwheel import errors
from trainer import staleness

logprobs = st.lists(st.tuples(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32)), min_size=1, max_size=30)


@given(pairs=logprobs)
def test_importance_weights_are_ratios_within_bounds(pairs: list[tuple[float, float]]) -> None:
    old, behaviour = torch.tensor(pairs).unbind(1)
    found = staleness.importance_weights(old.requires_grad_(), behaviour, least=0.5, greatest=5.0)
    expected = [min(max(math.exp(a - b), 0.5), 5.0) for a, b in pairs]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert not found.requires_grad


def test_a_token_whose_serving_was_not_recorded_counts_once() -> None:
    found = staleness.importance_weights(
        torch.tensor([-1.0, -1.0]), torch.tensor([math.nan, -1.5]), least=0.5, greatest=5.0
    )
    assert found.tolist() == pytest.approx([1.0, math.exp(0.5)])


def test_a_sample_is_as_stale_as_its_oldest_token() -> None:
    (sample,) = make_samples(1)
    assert staleness.staleness(sample, 7) == 0
    served = dataclasses.replace(sample, versions=("policy-000003", "policy-000005"))
    assert staleness.staleness(served, 7) == 4
    with pytest.raises(errors.InvalidArgument, match=r"versions: is 'latest', which names no version"):
        staleness.staleness(dataclasses.replace(sample, versions=("latest",)), 7)


@given(ages=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(0, 9))
def test_what_is_too_stale_is_dropped_and_counted(ages: list[int], limit: int) -> None:
    (group,) = make_groups(1)
    samples = [dataclasses.replace(group, versions=(f"policy-{10 - age:06d}",)) for age in ages]
    found = staleness.fresh(samples, 10, limit)
    kept = [age for age in ages if age <= limit]
    assert list(found.kept) == [sample for sample, age in zip(samples, ages, strict=True) if age <= limit]
    assert found.dropped == len(ages) - len(kept)
    assert found.greatest == max(kept, default=0)
    assert found.mean == pytest.approx(sum(kept) / len(kept) if kept else 0.0)
