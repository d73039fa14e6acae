"""The reward model: a score for how much people would prefer a response, learnt from comparisons.

With d = r(x, y_w) − r(x, y_l), less the pair's margin where one was better:

    none          −log σ(d)                                                            Bradley and Terry, 1952
    rao_kupper    −log σ(d − log θ);  tie: −log (θ²−1) σ(d − log θ) σ(−d − log θ)      Rao and Kupper, 1967
    davidson      −log e^{d/2} / Z;   tie: −log ν / Z,  Z = e^{d/2} + e^{−d/2} + ν     Davidson, 1970

θ and ν follow from the share of ties between equals. To each pair comes c (r_w² + r_l²), a Gaussian prior on scores
(Hou et al., 2024, ChatGLM-RLHF, arXiv 2404.00934), and the mean of the same losses of its aspects, each by its head.
Pairs are weighed so that length says nothing (`trainer.balance`).

Members of the ensemble learn the overall verdict too, each from a half of the pairs of its own (double-or-nothing
bootstrap; Owen and Eckles, 2012, arXiv 1106.2125) and from a random beginning (Osband et al., 2018, arXiv 1806.03335).
They read the model's features and do not change them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from thumbwheel.heads import Heads
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import balance, models
from trainer.batch import Batch
from trainer.losses.base import Losses, Objective, ParameterGroup, Prepared, Round, pairs
from trainer.losses.dpo import preference_measures
from trainer.samples import Pair, Sample

if TYPE_CHECKING:
    from trainer.config import LearningSettings

TieModel = Literal["none", "davidson", "rao_kupper"]

_KEPT = 0.95
"""Of what was counted of lengths, so much is left a round later."""


def ranking_losses(
    differences: Tensor, verdicts: Tensor, margins: Tensor, *, ties: TieModel = "none", tie_rate: float = 0.2
) -> Tensor:
    """[B] losses of [B] differences of scores, [B] verdicts (1 for the first, −1 for the second, 0 for neither) and [B]
    margins. `tie_rate` is the probability of a tie between equals. 0 for a tie where `ties` is none.
    """
    tied = verdicts == 0
    d = differences * verdicts - margins
    if ties == "none":
        return torch.where(tied, torch.zeros_like(d), -logsigmoid(d))
    d = torch.where(tied, differences, d)
    if ties == "rao_kupper":
        log_theta = math.log((1 + tie_rate) / (1 - tie_rate))
        lost = softplus(log_theta - d)
        return torch.where(tied, lost + softplus(log_theta + d) - math.log(math.expm1(2 * log_theta)), lost)
    log_nu = math.log(2 * tie_rate / (1 - tie_rate))
    normaliser = torch.stack([d / 2, -d / 2, torch.full_like(d, log_nu)]).logsumexp(0)
    return normaliser - torch.where(tied, torch.full_like(d, log_nu), d / 2)


def bootstrap_weight(sample_id: str, member: int) -> float:
    """2 or 0, with equal chances: how often a member of the ensemble sees a sample. The same in every run."""
    return 2.0 * (hashlib.sha256(f"{member}/{sample_id}".encode()).digest()[0] & 1)


@dataclass(frozen=True)
class Reward(Objective):
    """The ranking loss on a model with a score, read at the last token."""

    name: str = "reward"
    length_balance: bool = True
    score_penalty: float = 0.01
    """c."""
    ties: TieModel = "none"
    tie_rate: float = 0.2
    margin_weight: float = 1.0
    head_learning_rate: float = 0.0
    """0 for that of the body."""
    role: ClassVar[ModelRole.ValueType] = ModelRole.MODEL_ROLE_REWARD
    scores_text: ClassVar[bool] = True

    @classmethod
    def from_settings(cls, settings: LearningSettings) -> Reward:
        """As the settings say."""
        return cls(
            length_balance=settings.length_balance,
            score_penalty=settings.score_penalty,
            ties=settings.ties,
            tie_rate=settings.tie_rate,
            margin_weight=settings.margin_weight,
            head_learning_rate=settings.head_learning_rate,
        )

    def learns_from(self, sample: Sample) -> bool:
        """See `Objective.learns_from`. A tie counts where there is a model of ties, or one aspect was better."""
        judged = isinstance(sample, Pair) and (not sample.tie or any(verdict for _, verdict in sample.aspects))
        return judged or (isinstance(sample, Pair) and self.ties != "none")

    def stratum(self, sample: Sample) -> str:
        """See `Objective.stratum`: each step is nearly balanced by itself, which makes its gradient less noisy."""
        if not self.length_balance or not isinstance(sample, Pair):
            return ""
        return str(balance.stratum(0 if sample.tie else sample.longer))

    def load(self, path: Path) -> Any:
        """See `Objective.load`."""
        return models.load_scorer(path)

    def parameter_groups(self, model: Any, learning_rate: float) -> list[ParameterGroup]:
        """See `Objective.parameter_groups`."""
        head = list(model.score.parameters())
        body = [parameter for parameter in model.parameters() if all(parameter is not other for other in head)]
        return [ParameterGroup(body, learning_rate), ParameterGroup(head, self.head_learning_rate or learning_rate)]

    def prepare(self, round: Round) -> Prepared:
        """See `Objective.prepare`: the weights that balance lengths."""
        samples = [sample for sample in round.samples if isinstance(sample, Pair)]
        if not self.length_balance:
            return Prepared()
        counted = [(0 if sample.tie else sample.longer, sample.weight) for sample in samples]
        before = {_place(key): value for key, value in round.state.items() if key.startswith("length")}
        longer, given = zip(*counted, strict=True)
        weights = balance.weights(longer, given, before)
        filled = {
            sample.id: torch.full((sample.response_tokens,), weight)
            for sample, weight in zip(samples, weights, strict=True)
        }
        after = balance.count(counted, {place: _KEPT * value for place, value in before.items()})
        return Prepared(
            given={"balanced": filled},
            measures={"longer_won": _share(counted), "greatest_weight": max(weights)},
            state={f"length {bucket} {int(side)}": value for (bucket, side), value in after.items()},
        )

    def loss(self, model: Any, batch: Batch, constants: Mapping[str, float]) -> Losses:
        """See `Objective.loss`."""
        heads, samples = Heads.of(model.config.id2label), _pairs_of(batch)
        hidden = models.last_hidden(model, batch)
        found: Tensor = model.score(hidden)[:, : heads.judging].float()
        first, second = found.view(len(samples), 2, -1).unbind(1)  # each [B, 1 + aspects]
        differences = first - second
        verdicts = torch.tensor([_verdicts(sample, heads) for sample in samples], device=differences.device)
        said = ~verdicts.isnan()
        margins = torch.zeros_like(differences)
        margins[:, 0] = self.margin_weight * torch.tensor([float(sample.margin) for sample in samples])
        losses = ranking_losses(differences, verdicts.nan_to_num(0.0), margins, ties=self.ties, tie_rate=self.tie_rate)
        ranked = losses[:, 0].detach()
        losses = torch.where(said, losses + self.score_penalty * (first**2 + second**2), torch.zeros_like(losses))
        total = losses[:, 0] + losses[:, 1:].sum(1) / said[:, 1:].sum(1).clamp(min=1)
        if heads.ensemble:
            members = model.score(hidden.detach())[:, heads.judging :].float().view(len(samples), 2, -1)
            total = total + self._of_members(members, verdicts[:, :1], margins[:, :1], samples)
        weights = (
            pairs(batch.means(batch.given["balanced"]))[0] if "balanced" in batch.given else pairs(batch.weights)[0]
        )
        measures = self._measures(first.detach(), second.detach(), verdicts, samples, heads)
        return Losses(total, weights, {"ranking_loss": ranked, **measures})

    def _of_members(self, scores: Tensor, verdicts: Tensor, margins: Tensor, samples: Sequence[Pair]) -> Tensor:
        """[B] losses of the ensemble, of [B, 2, M] scores."""
        first, second = scores.unbind(1)
        seen = torch.tensor(
            [[bootstrap_weight(sample.id, member) for member in range(first.shape[1])] for sample in samples],
            device=scores.device,
        )
        ranked = ranking_losses(
            first - second,
            verdicts.expand_as(first),
            margins.expand_as(first),
            ties=self.ties,
            tie_rate=self.tie_rate,
        )
        return (seen * (ranked + self.score_penalty * (first**2 + second**2))).sum(1)

    def _measures(
        self, first: Tensor, second: Tensor, verdicts: Tensor, samples: Sequence[Pair], heads: Heads
    ) -> dict[str, Tensor]:
        won = verdicts[:, 0] != 0
        measures = preference_measures(first[won, 0], second[won, 0]) if bool(won.any()) else {}
        for index, aspect in enumerate(heads.aspects, 1):
            judged = verdicts[:, index].abs() == 1
            if bool(judged.any()):
                agreed = ((first - second)[:, index] * verdicts[:, index])[judged] > 0
                measures[f"{aspect}_accuracy"] = agreed.float()
        return measures


def _pairs_of(batch: Batch) -> list[Pair]:
    found = [row.sample for row in batch.rows if isinstance(row.sample, Pair)]
    assert len(found) == len(batch.rows), "it learns from pairs alone"
    return found


def _verdicts(sample: Pair, heads: Heads) -> list[float]:
    """By head, what was said: NaN for nothing."""
    by_aspect = dict(sample.aspects)
    return [0.0 if sample.tie else 1.0, *(float(by_aspect.get(aspect, math.nan)) for aspect in heads.aspects)]


def _place(key: str) -> tuple[int, bool]:
    _, bucket, side = key.split()
    return int(bucket), bool(int(side))


def _share(counted: Sequence[tuple[int, float]]) -> float:
    """Of the weight of pairs of different length, how much was won by the longer."""
    total = sum(weight for longer, weight in counted if longer)
    return sum(weight for longer, weight in counted if longer > 0) / total if total else 0.5
