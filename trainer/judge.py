"""How good a reward model is: it scores pairs that it did not learn from, and that is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thumbwheel.heads import Heads
from trainer import batch as batches
from trainer import calibration, models, runtime
from trainer.batch import Batch
from trainer.samples import Pair

_FACTOR = 2
"""Without gradients, so many times the tokens fit."""


@dataclass(frozen=True)
class Judged:
    """N pairs and what K heads say of them."""

    pairs: tuple[Pair, ...]
    heads: Heads
    scores: NDArray[np.float64]
    """[N, 2, K] of chosen and rejected."""

    @property
    def margins(self) -> NDArray[np.float64]:
        """[N] score of chosen less that of rejected, by the overall head."""
        found: NDArray[np.float64] = self.scores[:, 0, 0] - self.scores[:, 1, 0]
        return found

    @property
    def longer(self) -> NDArray[np.float64]:
        """[N] by how many tokens chosen is the longer one."""
        return np.array([float(pair.longer) for pair in self.pairs])

    @property
    def lengths(self) -> NDArray[np.float64]:
        """[2N] tokens of all responses, in the order of `scores`."""
        return np.array([[float(len(pair.chosen)), float(len(pair.rejected))] for pair in self.pairs]).ravel()

    @property
    def uncertainty(self) -> NDArray[np.float64]:
        """[N] standard deviation of the margin over the ensemble; 0 without one."""
        members = self.scores[:, 0, self.heads.judging :] - self.scores[:, 1, self.heads.judging :]
        found: NDArray[np.float64] = members.std(1, ddof=1) if self.heads.ensemble > 1 else np.zeros(len(self.pairs))
        return found

    def of(self, wanted: Callable[[Pair], bool]) -> Judged:
        """Only those pairs."""
        index = [number for number, pair in enumerate(self.pairs) if wanted(pair)]
        return Judged(tuple(self.pairs[number] for number in index), self.heads, self.scores[index])

    def aspect_margins(self, aspect: str) -> NDArray[np.float64]:
        """[n] margins by an aspect's head, of the pairs that were judged in it: above 0 where it agrees."""
        row = self.heads.names.index(aspect)
        found = [
            verdict * (self.scores[number, 0, row] - self.scores[number, 1, row])
            for number, pair in enumerate(self.pairs)
            if (verdict := dict(pair.aspects).get(aspect, 0))
        ]
        return np.array(found, dtype=float)

    def summary(self) -> dict[str, float]:
        """What a version's manifest says of it, and what is watched."""
        won = self.of(lambda pair: not pair.tie)
        margins = won.margins
        if not len(margins):
            return {}
        ece, temperature = calibration.cross_fitted_ece(margins)
        found = {
            "heldout_pairs": float(len(margins)),
            "heldout_accuracy": calibration.accuracy(margins),
            "heldout_loss": calibration.nll(margins),
            "heldout_ece": calibration.ece(margins),
            "heldout_ece_calibrated": ece,
            "temperature": temperature,
            "length_correlation": calibration.correlation(margins, won.longer),
            "score_mean": float(self.scores[:, :, 0].mean()),
            "score_std": float(self.scores[:, :, 0].std()),
        }
        for aspect in self.heads.aspects:
            if len(own := self.aspect_margins(aspect)):
                found[f"heldout_{aspect}_accuracy"] = calibration.accuracy(own)
        return found


@torch.no_grad()
def judge(
    function: Callable[[Batch], Tensor],
    heads: Heads,
    pairs: Sequence[Pair],
    *,
    device: torch.device,
    max_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> Judged:
    """What `function`, which is `models.head_scores` of a model with these heads, says of pairs. `max_tokens` as in
    `batches.micro_batches` of a pass with gradients. Raises `Stopped`.
    """
    scores = np.zeros((len(pairs), 2, len(heads.names)))
    place = {pair.id: number for number, pair in enumerate(pairs)}
    for rows in batches.micro_batches(pairs, _FACTOR * max_tokens):
        if stop():
            raise runtime.Stopped
        found = function(batches.collate(rows).to(device)).float().cpu().numpy().reshape(len(rows), 2, -1)
        for row, values in zip(rows, found, strict=True):
            scores[place[row.sample.id]] = values
    return Judged(tuple(pairs), heads, scores)


def judge_by(path: Path, pairs: Sequence[Pair], *, max_tokens: int, stop: Callable[[], bool] = lambda: False) -> Judged:
    """As `judge`, by the reward model in a folder, which is loaded for it. Raises `errors.FailedPrecondition`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load_scorer(path).eval().to(device)
    return judge(
        lambda batch: models.head_scores(model, batch),
        Heads.of(model.config.id2label),
        pairs,
        device=device,
        max_tokens=max_tokens,
        stop=stop,
    )
