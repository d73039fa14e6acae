"""Asking a model without gradients: what it says of every response token of many samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import batch as batches
from trainer import models, runtime
from trainer.batch import Batch
from trainer.samples import Sample

_FACTOR = 2
"""Without gradients, so many times the tokens fit."""


@torch.no_grad()
def per_token(
    function: Callable[[Any, Batch], Tensor],
    model: Any,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    stop: Callable[[], bool],
) -> dict[str, Tensor]:
    """By sample id, the [T] numbers that `function` returns for its response tokens, in float32. `max_tokens` as in
    `batches.micro_batches` of a pass with gradients. Raises `Stopped`.
    """
    device = next(model.parameters()).device
    found = {sample.id: torch.zeros(sample.response_tokens) for sample in samples}
    for rows in batches.micro_batches(samples, _FACTOR * max_tokens):
        if stop():
            raise runtime.Stopped
        spans = [row.span for row in rows]
        values = function(model, batches.collate(rows).to(device)).cpu()
        sizes = [span.stop - span.start for span in spans]
        for row, span, part in zip(rows, spans, torch.split(values, sizes), strict=True):
            found[row.sample.id][span] = part
    return found


def reference_logprobs(
    path: Path, samples: Sequence[Sample], *, max_tokens: int, stop: Callable[[], bool] = lambda: False
) -> dict[str, Tensor]:
    """Log-probabilities of all response tokens under the policy in `path`, which is loaded for it and freed again.

    Raises `Stopped`.
    """
    model = models.load_causal(path).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    found = per_token(models.response_token_logprobs, model, samples, max_tokens=max_tokens, stop=stop)
    del model
    runtime.free_memory()
    return found
