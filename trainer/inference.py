"""Asking a model without gradients: what it says of every response token of many samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import batch as batches
from trainer import models, ranks, runtime
from trainer.batch import Batch
from trainer.config import LearningSettings
from trainer.samples import Sample

_FACTOR = 2
"""Without gradients, so many times the tokens fit."""


@torch.no_grad()
def per_token(
    function: Callable[[Batch], Tensor],
    samples: Sequence[Sample],
    *,
    device: torch.device,
    max_tokens: int,
    stop: Callable[[], bool],
) -> dict[str, Tensor]:
    """By sample id, the [T] numbers that `function` returns for its response tokens, in float32. `max_tokens` as in
    `batches.micro_batches` of a pass with gradients. Ranks share the work, and all have the result. Raises `Stopped`.
    """
    whole = torch.zeros(sum(sample.response_tokens for sample in samples))
    sizes = [sample.response_tokens for sample in samples]
    found = dict(zip([sample.id for sample in samples], torch.split(whole, sizes), strict=True)) if samples else {}
    if ranks.count() > 1 and ranks.any_of(stop()):
        raise runtime.Stopped
    # Where the weights are spread over ranks, all of them have to take every turn.
    for rows, counts in batches.shared(samples, _FACTOR * max_tokens, ranks.rank(), ranks.count()):
        if ranks.count() == 1 and stop():
            raise runtime.Stopped
        spans = [row.span for row in rows]
        values = function(batches.collate(rows).to(device)).cpu()
        if counts:
            lengths = [span.stop - span.start for span in spans]
            for row, span, part in zip(rows, spans, torch.split(values, lengths), strict=True):
                found[row.sample.id][span] = part
    ranks.add(whole)
    return found


def stays(settings: LearningSettings) -> bool:
    """Whether the reference stays in a rank's memory from one round to the next. Beside weights in bf16, gradients in
    fp32 and the optimizer's state, it is a ninth more with one rank, and a third with very many.
    """
    divided = settings.zero_stage == 3 and ranks.count() > 1
    return not (divided or settings.cpu_offload or settings.lora_rank)


class Reference:
    """The reference model, which is asked about a round at a time. `keep` has it stay in memory for the next one."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._path: Path | None = None
        self._model: Any = None

    def logprobs(
        self, path: Path, samples: Sequence[Sample], *, max_tokens: int, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Tensor]:
        """Log-probabilities of all response tokens under the policy in `path`. Every rank has it whole. Raises
        `Stopped`.
        """
        device = runtime.device()
        if path != self._path:
            self.close()
            self._model, self._path = models.load_causal(path).eval().to(device), path
        ask = functools.partial(models.response_token_logprobs, self._model)
        found = per_token(ask, samples, device=device, max_tokens=max_tokens, stop=stop)
        del ask
        if not self._keep:
            self.close()
        return found

    def close(self) -> None:
        """Frees it, where it is in memory."""
        if self._model is not None:
            self._model = self._path = None
            runtime.free_memory()


def reference_logprobs(
    path: Path, samples: Sequence[Sample], *, max_tokens: int, stop: Callable[[], bool] = lambda: False
) -> dict[str, Tensor]:
    """What `Reference` says, once."""
    return Reference(keep=False).logprobs(path, samples, max_tokens=max_tokens, stop=stop)
