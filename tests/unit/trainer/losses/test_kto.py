"""KTO equals TRL's, and its weights and mismatched pairs are what the paper asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.trainer.losses import trl_peer
from tests.unit.trainer.samples import make_thumbs
from trainer.losses import kto
from trainer.losses.base import Round
from trainer.losses.kto import Kto
from trainer.samples import Sample

COUNT = 8


def round_of(
    samples: Sequence[Sample], reference: dict[str, Tensor], companions_now: dict[str, Tensor] | None = None
) -> Round:
    def evaluate(function: Callable[..., Any], wanted: Sequence[Sample]) -> dict[str, Tensor]:
        assert companions_now is not None
        return {sample.id: companions_now[sample.id].detach() for sample in wanted}

    return Round(samples, reference, 1, evaluate, {})


@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_kto_equals_trl_on_the_same_logprobs(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    thumbs = make_thumbs(COUNT)
    objective = Kto(beta=0.1)
    companions = kto.mismatched(thumbs, objective.seed)
    mismatched = [companions[thumb.id] for thumb in thumbs]
    everything = [*thumbs, *mismatched]
    policy = trl_peer.random_logprobs(everything, 0, scale=scale)
    reference = trl_peer.random_logprobs(everything, 4, scale=3.0)
    inputs = [policy[thumb.id].requires_grad_() for thumb in thumbs]
    round = round_of(thumbs, reference, policy)
    constants = {**objective.prepare(round).constants, **objective.before_step(round, thumbs)}
    # Of the two scales, one puts the policy below the reference, where z₀ is clamped to zero.
    assert (constants["z0"] > 0) == (scale < 1)
    ours = trl_peer.our_losses(objective, thumbs, policy, {"reference": reference}, constants, monkeypatch)
    theirs = trl_peer.kto_loss(
        trl_peer.Recorded(trl_peer.record(everything, policy)),
        trl_peer.Recorded(trl_peer.record(everything, reference)),
        thumbs,
        mismatched,
        beta=objective.beta,
        desirable=constants["desirable"],
        undesirable=constants["undesirable"],
    )
    trl_peer.assert_same(ours.losses.mean(), theirs, inputs)
    ratios = torch.stack([(policy[t.id] - reference[t.id]).sum().detach() for t in thumbs])
    liked = torch.tensor([thumb.liked for thumb in thumbs])
    torch.testing.assert_close(ours.measures["chosen_reward"], 0.1 * ratios[liked])
    torch.testing.assert_close(ours.measures["rejected_reward"], 0.1 * ratios[~liked])


@given(liked=st.integers(1, 10_000), disliked=st.integers(1, 10_000))
def test_weights_balance_the_two_sorts(liked: int, disliked: int) -> None:
    desirable, undesirable = kto.balancing_weights(liked, disliked)
    assert min(desirable, undesirable) == 1.0
    assert 1 - 1e-9 <= desirable * liked / (undesirable * disliked) <= 4 / 3 + 1e-9
    if 1 <= liked / disliked <= 4 / 3:
        assert desirable == undesirable == 1.0


def test_thumbs_of_one_sort_have_nothing_to_balance() -> None:
    assert kto.balancing_weights(5, 0) == kto.balancing_weights(0, 5) == (1.0, 1.0)


@given(count=st.integers(2, 20), seed=st.integers(0, 5))
def test_every_response_is_put_to_another_prompt_once(count: int, seed: int) -> None:
    thumbs = make_thumbs(count)
    companions = kto.mismatched(thumbs, seed)
    assert kto.mismatched(thumbs[::-1], seed) == companions
    assert set(companions) == {thumb.id for thumb in thumbs}
    for thumb in thumbs:
        assert companions[thumb.id].prompt == thumb.prompt
    index = {id(thumb.response): number for number, thumb in enumerate(thumbs)}
    put = [index[id(companions[thumb.id].response)] for thumb in thumbs]
    assert sorted(put) == list(range(count))
    assert all(other != own for own, other in enumerate(put))


def test_z0_is_of_the_step_alone_and_zero_for_a_single_thumb() -> None:
    thumbs = make_thumbs(4)
    companions = kto.mismatched(thumbs, 0)
    now = {c.id: torch.zeros(len(c.response)) for c in companions.values()}
    reference = {c.id: torch.full((len(c.response),), -1.0) for c in companions.values()}
    z0 = Kto(0.1).before_step(round_of(thumbs, reference, now), thumbs[:2])["z0"]
    lengths = [len(companions[thumb.id].response) for thumb in thumbs[:2]]
    assert z0 == pytest.approx(sum(lengths) / 2)
    assert Kto(0.1).before_step(round_of(thumbs[:1], {}), thumbs[:1]) == {"z0": 0.0}
