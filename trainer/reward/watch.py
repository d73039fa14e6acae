"""Whether the reward model still says what people prefer, judged on every comparison before it is learnt from.

Each comparison of a round is scored by the model as it is before the round (prequential evaluation: Gama et al., 2013,
On evaluating stream learning algorithms). So none is lost to a held-out set, and each is judged by a model that has not
seen it. The newest are kept, in training checkpoints.

Over-optimisation (Gao et al., 2023, arXiv 2210.10760): the newer policy versions get higher scores, and people do not
prefer them. Where that shows, `thumbwheel_reward_over_optimised` is 1, and it is logged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from thumbwheel import errors
from trainer import calibration

if TYPE_CHECKING:
    from trainer.judge import Judged

WATCH = "watch.json"

MOST = 512
"""Comparisons that are kept: the newest."""
LEAST = 20
"""Comparisons, or responses, below which nothing is said of them."""
SURE = 2.0
"""Standard errors by which scores must differ to have risen."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A comparison, as the model had it before it learnt from it."""

    chosen: float
    """Score of the better response."""
    rejected: float
    longer: int
    """Tokens by which chosen is the longer one."""
    writers: tuple[str, str]
    """The policy versions that wrote chosen and rejected; empty where a person did."""

    @property
    def margin(self) -> float:
        """Above 0 where the model was right."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Written:
    """Scores of what a policy version wrote."""

    count: int
    mean: float
    std: float


class RewardWatch:
    """The newest comparisons, oldest first."""

    def __init__(self, seen: Sequence[Seen] = ()) -> None:
        self._seen = list(seen)[-MOST:]

    def see(self, judged: Judged) -> None:
        """Takes in the comparisons of a round; ties say nothing of who was right."""
        for pair, (chosen, rejected) in zip(judged.pairs, judged.scores[:, :, 0].tolist(), strict=True):
            if not pair.tie:
                self._seen.append(Seen(chosen, rejected, pair.longer, pair.writers))
        self._seen = self._seen[-MOST:]

    def summary(self) -> dict[str, float]:
        """What a version's manifest says, and what is watched; nothing before there is enough."""
        if len(self._seen) < LEAST:
            return {}
        margins = np.array([seen.margin for seen in self._seen])
        scores = [score for seen in self._seen for score in (seen.chosen, seen.rejected)]
        ece, temperature = calibration.cross_fitted_ece(margins)
        return {
            "fresh_pairs": float(len(margins)),
            "fresh_accuracy": calibration.accuracy(margins),
            "fresh_ece": calibration.ece(margins),
            "fresh_ece_calibrated": ece,
            "temperature": temperature,
            "length_correlation": calibration.correlation(margins, [float(seen.longer) for seen in self._seen]),
            "score_mean": statistics.fmean(scores),
            "score_std": statistics.pstdev(scores),
        }

    def by_version(self) -> dict[str, Written]:
        """Scores by the policy version that wrote the responses, oldest first."""
        scores: dict[str, list[float]] = {}
        for seen in self._seen:
            for writer, score in zip(seen.writers, (seen.chosen, seen.rejected), strict=True):
                if writer:
                    scores.setdefault(writer, []).append(score)
        return {
            version: Written(len(found), statistics.fmean(found), statistics.pstdev(found))
            for version, found in sorted(scores.items())
        }

    def newer_preferred(self) -> tuple[int, int]:
        """Of the comparisons of two policy versions, in how many the newer was preferred; and how many there are."""
        between = [seen.writers for seen in self._seen if all(seen.writers) and seen.writers[0] != seen.writers[1]]
        return sum(chosen > rejected for chosen, rejected in between), len(between)

    def over_optimised(self) -> str:
        """Why the policy is thought to be over-optimised against this model; "" where it is not."""
        versions = {name: written for name, written in self.by_version().items() if written.count >= LEAST}
        preferred, compared = self.newer_preferred()
        if len(versions) < 2 or compared < LEAST:
            return ""
        (first, old), *_, (last, new) = versions.items()
        error = math.sqrt(old.std**2 / old.count + new.std**2 / new.count)
        if new.mean - old.mean <= SURE * error or preferred > compared / 2:
            return ""
        return (
            f"Scores rose from {old.mean:.2f} ({first}) to {new.mean:.2f} ({last}), but of {compared} comparisons of "
            f"two versions people preferred the newer in {preferred}"
        )

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        (folder / WATCH).write_text(json.dumps([dataclasses.asdict(seen) for seen in self._seen]))

    @classmethod
    def load(cls, folder: Path | None) -> RewardWatch:
        """Reads what `save` wrote; nothing where an older release wrote none. Raises `errors.CorruptCheckpoint`."""
        if folder is None or not (folder / WATCH).exists():
            return cls()
        try:
            rows = json.loads((folder / WATCH).read_text())
            return cls([Seen(**{**row, "writers": tuple(row["writers"])}) for row in rows])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise errors.CorruptCheckpoint(
                f"{folder / WATCH} cannot be read: {error}.", remedy="Was it written by another release?"
            ) from error
