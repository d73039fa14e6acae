"""What the heads of a reward version say: score, aspects, uncertainty, and which of two is preferred."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.heads import Heads
from thumbwheel.v1 import reward_pb2 as pb


@dataclass(frozen=True)
class Reading:
    """How the numbers of a version are read."""

    heads: Heads
    temperature: float
    """What differences of scores are divided by to give probabilities."""

    @classmethod
    def of(cls, version: VerifiedVersion) -> Reading:
        """As its configuration and its manifest say."""
        labels = json.loads((version.path / "config.json").read_text()).get("id2label") or {"0": "overall"}
        heads = Heads.of({int(index): name for index, name in labels.items()})
        return cls(heads, version.manifest.metrics.get("temperature", 1.0))

    def score(self, values: Sequence[float], reference: Sequence[float] | None, tokens: int) -> pb.RewardScore:
        """Of the [K] numbers of a response, and of the reference's response to the same prompt."""
        score = pb.RewardScore(score=values[0], tokens=tokens, aspects=self._aspects(values))
        members = list(values[self.heads.judging :])
        if reference is not None:
            score.score_over_reference = values[0] - reference[0]
            members = [ours - theirs for ours, theirs in zip(members, reference[self.heads.judging :], strict=True)]
        if len(members) > 1:
            score.uncertainty = statistics.stdev(members)
        return score

    def compare(self, a: Sequence[float], b: Sequence[float], response: pb.CompareResponse) -> None:
        """Fills in which of two is preferred, of their [K] numbers."""
        response.probability_a = self._probability(a[0] - b[0])
        members = zip(a[self.heads.judging :], b[self.heads.judging :], strict=True)
        probabilities = [self._probability(ours - theirs) for ours, theirs in members]
        if len(probabilities) > 1:
            response.uncertainty = statistics.stdev(probabilities)
        first, second = self._aspects(a), self._aspects(b)
        response.aspects.update({name: self._probability(first[name] - second[name]) for name in first})

    def _aspects(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.heads.aspects, values[1 : self.heads.judging], strict=True))

    def _probability(self, difference: float) -> float:
        return 1.0 / (1.0 + math.exp(min(-difference / self.temperature, 80.0)))
