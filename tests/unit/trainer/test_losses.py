"""The objectives equal TRL's, on the same tensors and on the same model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.unit.trainer.samples import make_samples
from thumbwheel import errors
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import batch, losses, models
from trainer.config import TrainerSettings
from trainer.losses.dpo import Dpo, dpo_loss
from trainer.losses.reward import Reward, ranking_loss

PAIRS = 7


def trl_dpo(model: Any, reference: Any, inputs: dict[str, Tensor], beta: float) -> Tensor:
    """The loss that TRL's trainer computes, by its own code, without the rest of a trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Tensor = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss


class Recorded(torch.nn.Module):
    """A model whose log-probabilities are given: one a sequence, at its first position."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """What TRL reads of a model's output."""
        rows, length = inputs["input_ids"].shape
        spread = torch.cat([self.logprobs[:, None], torch.zeros(rows, length - 2)], dim=1)
        none = torch.zeros(rows, length - 1)
        return SimpleNamespace(log_probs=spread, entropy=none, mean_logits=none, is_top1=none.bool(), aux_loss=None)


def test_dpo_equals_trl_on_the_same_logprobs() -> None:
    torch.manual_seed(0)
    policy, reference = (-40 * torch.rand(2, 2 * PAIRS)).requires_grad_()
    tokens = torch.ones(2 * PAIRS, 3, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens, "completion_mask": tokens}
    theirs = trl_dpo(Recorded(policy), Recorded(reference), inputs, beta=0.1)
    ours = dpo_loss(*policy.chunk(2), *reference.detach().chunk(2), beta=0.1)
    torch.testing.assert_close(ours.losses.mean(), theirs, rtol=0, atol=1e-5)
    (their_gradient,) = torch.autograd.grad(theirs, policy, retain_graph=True)
    (our_gradient,) = torch.autograd.grad(ours.losses.mean(), policy)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-6)


def test_dpo_equals_trl_on_the_same_models(policy_path: Path, tmp_path: Path) -> None:
    """End to end: log-probabilities, masks and loss, by TRL's layout of separate padded sequences and by ours."""
    from trl.trainer.utils import add_fused_lm_head

    from tests.support import make_tiny_llama

    samples = make_samples(PAIRS)
    sequences = [s.prompt + s.chosen for s in samples] + [s.prompt + s.rejected for s in samples]
    rows = [torch.tensor(sequence) for sequence in sequences]
    prompts = [len(sample.prompt) for sample in samples] * 2
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "completion_mask": pad_sequence(
            [(torch.arange(len(row)) >= prompt).long() for row, prompt in zip(rows, prompts, strict=True)],
            batch_first=True,
        ),
    }
    policy = models.load_causal(policy_path).float()
    reference = models.load_causal(make_tiny_llama(tmp_path, seed=5)).float()
    layout = batch.collate(samples)
    with torch.no_grad():
        reference_logprobs = models.response_logprobs(reference, layout)
    ours = Dpo(beta=0.1).loss(policy, layout, reference_logprobs).losses.mean()

    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs = trl_dpo(policy, reference, inputs, beta=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    their_gradients = torch.autograd.grad(theirs, list(policy.parameters()))
    our_gradients = torch.autograd.grad(ours, list(policy.parameters()))
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-5)


def test_the_nll_term_is_the_mean_loss_of_the_chosen_tokens(policy_path: Path) -> None:
    """Against the next-token loss that Transformers computes for each chosen response by itself."""
    samples = make_samples(PAIRS)
    policy = models.load_causal(policy_path).float()
    layout = batch.collate(samples)
    reference = torch.zeros(2 * PAIRS)
    plain, with_nll = (Dpo(0.1, weight).loss(policy, layout, reference) for weight in (0.0, 0.3))
    theirs = []
    for sample in samples:
        labels = torch.tensor([[-100] * len(sample.prompt) + list(sample.chosen)])
        theirs.append(policy(input_ids=torch.tensor([sample.prompt + sample.chosen]), labels=labels).loss)
    ours = with_nll.losses - plain.losses
    torch.testing.assert_close(ours, 0.3 * torch.stack(theirs), rtol=1e-4, atol=1e-4)
    gradients = (torch.autograd.grad(term, list(policy.parameters())) for term in (ours.sum(), 0.3 * sum(theirs)))
    for our, their in zip(*gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)
    assert torch.equal(with_nll.chosen_rewards, plain.chosen_rewards)


def test_the_reward_loss_equals_trls() -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    torch.manual_seed(0)
    scores = (3 * torch.randn(2 * PAIRS)).requires_grad_()
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = RewardTrainer.compute_loss(
        trainer,
        lambda **inputs: SimpleNamespace(logits=scores[:, None]),
        {"attention_mask": torch.ones(2 * PAIRS, 3)},
    )
    ours = ranking_loss(*scores.chunk(2)).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores) for loss in (ours, theirs)), rtol=0, atol=1e-6)


def test_rewards_say_what_the_loss_means() -> None:
    policy, reference = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
    found = dpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], beta=0.5)
    assert found.chosen_rewards.item() == pytest.approx(0.5)
    assert found.rejected_rewards.item() == pytest.approx(-0.5)
    assert found.losses.item() == pytest.approx(0.313262, abs=1e-6)  # ln(1 + 1/e)


def test_objectives_are_found_by_name_and_role() -> None:
    settings = TrainerSettings(beta=0.3, nll_weight=0.2)
    assert losses.objective("dpo", ModelRole.MODEL_ROLE_POLICY, settings) == Dpo(beta=0.3, nll_weight=0.2)
    assert losses.objective("reward", ModelRole.MODEL_ROLE_REWARD, settings) == Reward()
    with pytest.raises(errors.InvalidArgument, match=r"policy_objective: is 'reward'. Use one of dpo"):
        losses.objective("reward", ModelRole.MODEL_ROLE_POLICY, settings)
