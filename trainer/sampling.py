"""Responses of a model that is not served: those of the reference, by which rewards are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import models, runtime
from trainer.samples import Tokens

_ROWS = 64
"""Prompts that are answered at once."""


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Tokens], *, eos: int, max_tokens: int, seed: int) -> list[Tokens]:
    """A response to each prompt, drawn at temperature 1, with its end-of-text token where it ended by itself."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    # Ours makes no number of a padded place that looks at nothing; torch's own does.
    model.set_attn_implementation("sdpa")
    responses: list[Tokens] = []
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for rows in _batches(prompts):
            # Padding is on the left, so that all rows go on at the same place.
            length = max(map(len, rows))
            ids = torch.tensor([[eos] * (length - len(row)) + list(row) for row in rows], device=device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
                eos_token_id=eos,
                pad_token_id=eos,
            )
            responses += [_until_end(row[length:].tolist(), eos) for row in out]
    model.set_attn_implementation(attention)
    model.train(was_training)
    return responses


def reference_texts(
    path: Path, tokenizer: Any, prompts: Sequence[Tokens], *, max_tokens: int, seed: int
) -> Mapping[Tokens, str]:
    """A response, as text, of the model in `path` to each prompt. It is loaded for it, and freed again."""
    model = models.load_causal(path).to("cuda" if torch.cuda.is_available() else "cpu")
    eos = int(tokenizer.eos_token_id)
    found = sample(model, prompts, eos=eos, max_tokens=max_tokens, seed=seed)
    del model
    runtime.free_memory()
    return {
        prompt: tokenizer.decode(response, skip_special_tokens=True)
        for prompt, response in zip(prompts, found, strict=True)
    }


def _batches(prompts: Sequence[Tokens]) -> Iterator[Sequence[Tokens]]:
    for start in range(0, len(prompts), _ROWS):
        yield prompts[start : start + _ROWS]


def _until_end(tokens: list[int], eos: int) -> Tokens:
    return tuple(tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
