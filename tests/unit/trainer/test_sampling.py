"""Responses drawn in the trainer itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import models, sampling

EOS = 2
PROMPTS = [(5, 6, 7, 8, 9, 10), (11,), (12, 13, 14)]


def test_padding_changes_no_response(policy_path: Path) -> None:
    """With a distribution so sharp that nothing is left to chance."""
    model = models.load_causal(policy_path)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(64)
    together = sampling.sample(model, PROMPTS, eos=EOS, max_tokens=12, seed=0)
    alone = [sampling.sample(model, [prompt], eos=EOS, max_tokens=12, seed=1)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({response[0] for response in together}) > 1


def test_a_seed_gives_the_same_again_and_the_callers_random_state_stays(policy_path: Path) -> None:
    model = models.load_causal(policy_path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (sampling.sample(model, PROMPTS, eos=EOS, max_tokens=40, seed=seed) for seed in (0, 0, 1))
    assert first == same != other
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(len(response) == 40 or response[-1] == EOS for response in first)
    assert all(EOS not in response[:-1] for response in first)


def test_texts_of_the_reference_go_by_their_prompts(policy_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    found = sampling.reference_texts(policy_path, tokenizer, PROMPTS, max_tokens=8, seed=3)
    assert list(found) == PROMPTS
    with pytest.raises(KeyError):
        found[(99,)]
