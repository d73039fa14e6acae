"""The reward model's losses equal TRL's where it has one, and plain ones written here."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support import make_tiny_llama
from tests.unit.trainer.samples import make_sample
from thumbwheel.heads import Heads
from trainer import batch, models, publish
from trainer.losses.base import Round
from trainer.losses.reward import Reward, TieModel, bootstrap_weight, ranking_losses
from trainer.samples import Pair

PAIRS = 7


def trls_loss(scores: Tensor, margins: Tensor | None) -> Tensor:
    """The loss of TRL's RewardTrainer on scores of all chosen and then all rejected responses."""
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Tensor = RewardTrainer.compute_loss(
        trainer,
        lambda **inputs: SimpleNamespace(logits=scores[:, None]),
        {"attention_mask": torch.ones(len(scores), 3)} | ({} if margins is None else {"margin": margins}),
    )
    return loss


@pytest.mark.parametrize("with_margins", [False, True])
def test_the_reward_loss_equals_trls(with_margins: bool) -> None:
    torch.manual_seed(0)
    scores = (3 * torch.randn(2 * PAIRS)).requires_grad_()
    margins = torch.rand(PAIRS) if with_margins else torch.zeros(PAIRS)
    chosen, rejected = scores.chunk(2)
    ours = ranking_losses(chosen - rejected, torch.ones(PAIRS), margins).mean()
    theirs = trls_loss(scores, margins if with_margins else None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores) for loss in (ours, theirs)), rtol=0, atol=1e-6)


def plain_probabilities(ties: TieModel, first: float, second: float, rate: float) -> tuple[float, float, float]:
    """Probabilities that the first wins, that the second wins, and of a tie, as the papers write them."""
    a, b = math.exp(first), math.exp(second)
    if ties == "davidson":
        nu = 2 * rate / (1 - rate)
        total = a + b + nu * math.sqrt(a * b)
        return a / total, b / total, nu * math.sqrt(a * b) / total
    theta = (1 + rate) / (1 - rate)
    won, lost = a / (a + theta * b), b / (b + theta * a)
    return won, lost, (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_ties_are_as_the_papers_have_them(ties: TieModel) -> None:
    rng, rate = random.Random(0), 0.3
    for _ in range(20):
        first, second = rng.gauss(0, 2), rng.gauss(0, 2)
        expected = plain_probabilities(ties, first, second, rate)
        assert sum(expected) == pytest.approx(1.0)
        verdicts = torch.tensor([1.0, -1.0, 0.0], dtype=torch.double)
        d = torch.full((3,), first - second, dtype=torch.double)
        found = (-ranking_losses(d, verdicts, torch.zeros_like(d), ties=ties, tie_rate=rate)).exp()
        assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert plain_probabilities(ties, 1.0, 1.0, rate)[2] == pytest.approx(rate)  # the setting means what it says


def test_without_a_model_of_ties_nothing_is_learnt_from_them() -> None:
    tie = Pair(id="t", prompt=(1,), chosen=(2,), rejected=(3,), tie=True)
    assert not Reward().learns_from(tie)
    assert Reward(ties="davidson").learns_from(tie)
    assert ranking_losses(torch.tensor([5.0]), torch.tensor([0.0]), torch.tensor([0.0])).item() == 0.0


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A reward model with all kinds of heads, none of them zero, in float32 so that only the loss can differ."""
    base = make_tiny_llama(tmp_path_factory.mktemp("base"), seed=3)
    path = tmp_path_factory.mktemp("scorer")
    publish.write_scorer(base, path, Heads(("helpfulness", "fluency"), 2))
    model: torch.nn.Module = models.load_scorer(path).float()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight, std=0.3)  # type: ignore[arg-type,union-attr]
    return model


def judged_pairs() -> list[Pair]:
    rng = random.Random(5)
    first, second, third = (
        make_sample(rng, prompt=9, chosen=7, rejected=4, weight=weight) for weight in (1.0, 0.5, 2.0)
    )
    return [
        dataclasses.replace(first, aspects=(("fluency", -1), ("helpfulness", 1)), margin=0.7),
        dataclasses.replace(second, aspects=(("helpfulness", 0), ("unheard-of", 1))),
        dataclasses.replace(third, tie=True, aspects=(("fluency", 1),)),
    ]


def test_the_whole_loss_equals_a_plain_one(scorer: torch.nn.Module) -> None:
    """Heads, aspects, ties, margins, the prior on scores and the ensemble, from sequences that are computed apart."""
    objective = Reward(length_balance=False, score_penalty=0.05, ties="davidson", tie_rate=0.25, margin_weight=2.0)
    samples = judged_pairs()
    found = objective.loss(scorer, batch.collate(batch.whole(samples)), {})

    def one(difference: Tensor, verdict: float, margin: float, scores: tuple[Tensor, Tensor]) -> Tensor:
        d, nu = (difference if verdict == 0 else verdict * difference - margin), 2 * 0.25 / 0.75
        top = torch.tensor(nu) if verdict == 0 else (d / 2).exp()
        ranked = -(top / ((d / 2).exp() + (-d / 2).exp() + nu)).log()
        return ranked + 0.05 * (scores[0] ** 2 + scores[1] ** 2)

    for sample, loss in zip(samples, found.losses, strict=True):
        both = [
            scorer(input_ids=torch.tensor([[*sample.prompt, *response]]), pad_token_id=None).logits[0]
            for response in sample.responses
        ]
        difference = both[0] - both[1]
        verdict, margin = (0.0 if sample.tie else 1.0), 2.0 * sample.margin
        expected = one(difference[0], verdict, margin, (both[0][0], both[1][0]))
        heads = {"helpfulness": 1, "fluency": 2}
        said = [(heads[aspect], float(v)) for aspect, v in sample.aspects if aspect in heads]
        if said:
            parts = [one(difference[row], v, 0.0, (both[0][row], both[1][row])) for row, v in said]
            expected = expected + torch.stack(parts).mean()
        for member in range(2):
            row, seen = 3 + member, bootstrap_weight(sample.id, member)
            expected = expected + seen * one(difference[row], verdict, margin, (both[0][row], both[1][row]))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert found.weights.tolist() == [1.0, 0.5, 2.0]
    assert found.measures["helpfulness_accuracy"].numel() == 1  # one was judged a tie, one was not judged


def test_the_ensemble_does_not_change_the_features(scorer: torch.nn.Module) -> None:
    samples = judged_pairs()[:1]
    gradients: list[torch.Tensor] = []
    for ensemble in (True, False):
        if not ensemble:
            scorer.config.id2label = dict(enumerate(("overall", "helpfulness", "fluency")))  # type: ignore[union-attr]
        found = Reward(length_balance=False).loss(scorer, batch.collate(batch.whole(samples)), {})
        weight = scorer.get_parameter("model.layers.0.mlp.up_proj.weight")
        gradients += torch.autograd.grad(found.losses.sum(), weight)
    scorer.config.id2label = dict(enumerate(Heads(("helpfulness", "fluency"), 2).names))  # type: ignore[union-attr]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_members_of_the_ensemble_see_halves_of_their_own() -> None:
    weights = [[bootstrap_weight(f"sample-{index}", member) for index in range(1000)] for member in range(3)]
    for member in weights:
        assert set(member) == {0.0, 2.0}
        assert sum(member) / 1000 == pytest.approx(1.0, abs=0.1)
    assert sum(a == b for a, b in zip(weights[0], weights[1], strict=True)) / 1000 == pytest.approx(0.5, abs=0.06)


def test_balanced_weights_reach_the_loss_and_outlive_the_round(scorer: torch.nn.Module) -> None:
    rng = random.Random(0)
    samples = [make_sample(rng, chosen=20, rejected=10) for _ in range(6)]
    samples += [make_sample(rng, chosen=10, rejected=20) for _ in range(2)]
    objective = Reward()
    first = objective.prepare(Round(samples, {}, 1, lambda function, wanted: {}, {}))
    found = objective.loss(scorer, batch.collate(batch.whole(samples), first.given), {})
    assert found.weights.tolist() == pytest.approx([8 / 12] * 6 + [8 / 4] * 2)
    assert first.measures["longer_won"] == 0.75
    # A round of one side alone is balanced by what came before.
    second = objective.prepare(Round(samples[:4], {}, 1, lambda function, wanted: {}, first.state))
    longer, shorter = 6 + 4, 2
    expected = (longer + shorter) / (2 * longer)
    assert second.given["balanced"][samples[0].id][0].item() == pytest.approx(expected)
