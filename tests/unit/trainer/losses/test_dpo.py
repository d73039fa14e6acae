"""DPO and its family equal TRL's, on the same log-probabilities and on the same models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import make_tiny_llama
from tests.unit.trainer.losses import trl_peer
from tests.unit.trainer.samples import make_samples, with_sums
from trainer import batch, models
from trainer.losses import DPO_FAMILY
from trainer.losses.dpo import Dpo
from trainer.samples import Pair

PAIRS = 7
SMOOTHING = 0.2


def trl_inputs(samples: list[Pair]) -> dict[str, Tensor]:
    sequences = [s.prompt + s.chosen for s in samples] + [s.prompt + s.rejected for s in samples]
    return trl_peer.padded(sequences, [len(s.prompt) for s in samples] * 2)


@pytest.mark.parametrize(
    ("objective", "types", "weights"),
    [
        (Dpo("dpo"), ["sigmoid"], [1.0]),
        (Dpo("dpo", beta=0.7), ["sigmoid"], [1.0]),
        (Dpo("ipo", beta=0.4), ["ipo"], [1.0]),
        (Dpo("robust", label_smoothing=SMOOTHING), ["robust"], [1.0]),
        (Dpo("sigmoid_norm", beta=2.0), ["sigmoid_norm"], [1.0]),
        # Of a single pair, the distributional AOT is conservative DPO; and TRL's mean over a batch's tokens is RPO's.
        (Dpo("cdpo", label_smoothing=SMOOTHING), ["aot"], [1.0]),
        (Dpo("dpo", nll_weight=0.3), ["sigmoid", "sft"], [1.0, 0.3]),
        (Dpo("ipo", nll_weight=0.3), ["ipo", "sft"], [1.0, 0.3]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) and isinstance(value[0], str) else None,
)
def test_every_variant_equals_trl_on_the_same_logprobs(
    objective: Dpo, types: list[str], weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(PAIRS)
    policy, reference = (trl_peer.random_logprobs(samples, seed) for seed in (0, 1))
    inputs = trl_peer.leaves(policy)
    their_policy, their_reference = (
        trl_peer.Recorded(trl_peer.record(samples, values)) for values in (policy, reference)
    )
    one_by_one = types[0] == "aot" or "sft" in types
    parts = [[sample] for sample in samples] if one_by_one else [samples]
    theirs = torch.stack(
        [
            trl_peer.dpo_loss(
                their_policy,
                their_reference,
                trl_inputs(part),
                beta=objective.beta,
                types=types,
                weights=weights,
                smoothing=SMOOTHING,
            )
            for part in parts
        ]
    ).mean()
    ours = trl_peer.our_losses(objective, samples, policy, {"reference": reference}, {}, monkeypatch)
    trl_peer.assert_same(ours.losses.mean(), theirs, inputs)


def test_dpo_equals_trl_on_the_same_models(policy_path: Path, tmp_path: Path) -> None:
    """End to end: log-probabilities, masks and loss, by TRL's layout of separate padded sequences and by ours."""
    from trl.trainer.utils import add_fused_lm_head

    samples = make_samples(PAIRS)
    policy = models.load_causal(policy_path).float()
    reference = models.load_causal(make_tiny_llama(tmp_path, seed=5)).float()
    rows = batch.whole(samples)
    with torch.no_grad():
        flat = models.response_token_logprobs(reference, batch.collate(rows))
    given = dict(zip([s.id for s in samples], torch.split(flat, [s.response_tokens for s in samples]), strict=True))
    ours = Dpo(beta=0.1).loss(policy, batch.collate(rows, {"reference": given}), {}).losses.mean()

    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs = trl_peer.dpo_loss(policy, reference, trl_inputs(samples), beta=0.1)
    # 2e-7 apart; once, late in a run of all tests, 4e-5, and never again. Computing in bf16 is 1e-3 apart.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    their_gradients = torch.autograd.grad(theirs, list(policy.parameters()))
    our_gradients = torch.autograd.grad(ours, list(policy.parameters()))
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-5)


def test_rewards_say_what_the_loss_means(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(1)
    policy, reference = with_sums(samples, -10.0, -12.0), with_sums(samples, -11.0, -11.0)
    found = trl_peer.our_losses(Dpo(beta=0.5), samples, policy, {"reference": reference}, {}, monkeypatch)
    expected = {"chosen_reward": 0.5, "rejected_reward": -0.5, "margin": 1.0, "accuracy": 1.0}
    expected |= {"kl": 0.0, "entropy": (10 / len(samples[0].chosen) + 12 / len(samples[0].rejected)) / 2}
    assert {name: value.item() for name, value in found.measures.items()} == pytest.approx(expected, abs=1e-5)
    assert found.losses.item() == pytest.approx(0.313262, abs=1e-6)  # ln(1 + 1/e)
    nearer = with_sums(samples, -12.0, -15.0)  # log-ratios of 1 and 4 nats
    found = trl_peer.our_losses(Dpo(beta=0.5), samples, reference, {"reference": nearer}, {}, monkeypatch)
    assert found.measures["kl"].item() == pytest.approx(2.5, abs=1e-5)


def test_without_doubt_the_smoothed_variants_are_dpo(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(PAIRS)
    policy, reference = (trl_peer.random_logprobs(samples, seed) for seed in (0, 1))
    plain, *smoothed = (
        trl_peer.our_losses(
            Dpo(name, label_smoothing=0.0), samples, policy, {"reference": reference}, {}, monkeypatch
        ).losses
        for name in ("dpo", "cdpo", "robust")
    )
    for losses in smoothed:
        torch.testing.assert_close(losses, plain)


def test_the_lineage_names_what_each_variant_has() -> None:
    settings = {name: Dpo(name, 0.1, 0.2, 0.0).settings() for name in DPO_FAMILY}
    assert settings["dpo"] == settings["ipo"] == settings["sigmoid_norm"] == {"beta": "0.1"}
    assert settings["cdpo"] == settings["robust"] == {"beta": "0.1", "label_smoothing": "0.2"}
    assert Dpo("dpo", 0.1, 0.2, 1.0).settings() == {"beta": "0.1", "nll_weight": "1.0"}
