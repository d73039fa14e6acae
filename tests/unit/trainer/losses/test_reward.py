"""The ranking loss equals TRL's."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch

from trainer.losses.reward import ranking_losses

PAIRS = 7


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
    ours = ranking_losses(*scores.chunk(2)).mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores) for loss in (ours, theirs)), rtol=0, atol=1e-6)
