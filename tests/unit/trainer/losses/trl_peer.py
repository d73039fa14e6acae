"""TRL's own methods, without the rest of a trainer: on a stand-in for `self`, and on given log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer import batch, models
from trainer.losses.base import Losses, Objective
from trainer.samples import Group, Sample, Thumb

Recording = Mapping[tuple[int, ...], tuple[int, Tensor]]
"""By the tokens of a sequence: how many of them are prompt, and the log-probabilities [T] of the others."""


def record(samples: Sequence[Sample], values: Mapping[str, Tensor]) -> dict[tuple[int, ...], tuple[int, Tensor]]:
    """The log-probabilities `values`, [T] by sample id, by the tokens of the sequences."""
    found = {}
    for sample in samples:
        parts = torch.split(values[sample.id], [len(response) for response in sample.responses])
        for response, part in zip(sample.responses, parts, strict=True):
            found[sample.prompt + response] = (len(sample.prompt), part)
    return found


class Recorded(torch.nn.Module):
    """A model whose log-probabilities are given."""

    is_gradient_checkpointing = False

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """What TRL reads of a model's output."""
        rows, length = inputs["input_ids"].shape
        spread = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            prompt, values = self._recording[tuple(ids[mask.bool()].tolist())]
            spread.append(torch.cat([torch.zeros(prompt - 1), values, torch.zeros(length - prompt - len(values))]))
        none = torch.zeros(rows, length - 1)
        return SimpleNamespace(
            log_probs=torch.stack(spread), entropy=none, mean_logits=none, is_top1=none.bool(), aux_loss=None
        )


def padded(sequences: Sequence[tuple[int, ...]], prompts: Sequence[int], prefix: str = "") -> dict[str, Tensor]:
    """Sequences as TRL's collators lay them out, one a row."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    completions = [(torch.arange(len(row)) >= prompt).long() for row, prompt in zip(rows, prompts, strict=True)]
    return {
        f"{prefix}input_ids": pad_sequence(rows, batch_first=True),
        f"{prefix}attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        f"{prefix}completion_mask": pad_sequence(completions, batch_first=True),
    }


def _itself(value: Tensor, **_: object) -> Tensor:
    return value


def _accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), gather=_itself, gather_for_metrics=_itself, reduce=_itself, process_index=0
    )


def _common(model: Any, reference: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=_accelerator(),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def dpo_loss(
    model: Any,
    reference: Any,
    inputs: dict[str, Tensor],
    *,
    beta: float,
    types: Sequence[str] = ("sigmoid",),
    weights: Sequence[float] = (1.0,),
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of TRL's DPOTrainer on a batch of all chosen and then all rejected sequences."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = _common(
        model,
        reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=list(types),
        loss_weights=list(weights),
        label_smoothing=smoothing,
        use_weighting=False,
        beta=beta,
    )
    loss: Tensor = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss


def kto_loss(
    model: Any,
    reference: Any,
    thumbs: Sequence[Thumb],
    mismatched: Sequence[Thumb],
    *,
    beta: float,
    desirable: float,
    undesirable: float,
) -> Tensor:
    """The loss of TRL's KTOTrainer."""
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = _common(
        model,
        reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    inputs = {
        **padded([t.prompt + t.response for t in thumbs], [len(t.prompt) for t in thumbs]),
        **padded([t.prompt + t.response for t in mismatched], [len(t.prompt) for t in mismatched], "KL_"),
        "label": torch.tensor([thumb.liked for thumb in thumbs]),
    }
    loss: Tensor = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss


def policy_gradient_loss(
    name: str,
    groups: Sequence[Group],
    policy: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    kl_weight: float,
    clip_range: float,
    importance: tuple[float, float] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Tensor, Tensor]:
    """Advantages and loss of TRL's GRPOTrainer or RLOOTrainer, on groups of one size: first it scores, then learns.

    With `importance` it corrects for how the tokens were served, within these bounds.
    """
    from trl import import_utils

    # Nothing is generated here, so it need not load vLLM.
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *_, **__: False)
    from trl.trainer import grpo_trainer, rloo_trainer

    module, trainer_class = (
        (grpo_trainer, grpo_trainer.GRPOTrainer) if name == "grpo" else (rloo_trainer, rloo_trainer.RLOOTrainer)
    )
    for gathering in ("gather", "gather_object"):
        monkeypatch.setattr(module, gathering, _itself)
    recordings = {"old": old, "policy": policy, "reference": reference}
    tables = {which: record(groups, values) for which, values in recordings.items()}

    def logprobs(model: _Named, ids: Tensor, mask: Tensor, keep: int, *_: object, **__: object) -> Any:
        parts = [tables[model.name][tuple(row[m.bool()].tolist())][1] for row, m in zip(ids, mask, strict=True)]
        found = torch.stack([torch.cat([part, torch.zeros(keep - len(part))]) for part in parts])
        return found, torch.zeros_like(found), None

    responses = [response for group in groups for response in group.responses]
    prompts = [list(group.prompt) for group in groups for _ in group.responses]
    scores = torch.tensor([[rollout.reward] for group in groups for rollout in group.rollouts])
    generated: tuple[Any, ...] = (prompts, [list(response) for response in responses], ["" for _ in responses])
    served = None
    if importance:
        served = [list(rollout.logprobs) for group in groups for rollout in group.rollouts]
    if name == "grpo":
        generated = (*generated[:2], None, generated[2], served, {}, None, [])
    size = len(groups[0].rollouts)
    trainer = _common(
        _Named("old"),
        _Named("reference"),
        args=SimpleNamespace(
            steps_per_generation=2,  # so that it keeps the log-probabilities from before the round
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(responses),
            delta=None,
            use_bias_correction_kl=False,
        ),
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        num_generations=size,
        use_vllm=importance is not None,
        vllm_importance_sampling_correction=importance is not None,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=importance[0] if importance else None,
        vllm_importance_sampling_clip_max=importance[1] if importance else None,
        beta=kl_weight,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *arguments: scores,
        _get_per_token_logps_and_entropies=logprobs,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        reward_func_names=["score"],
        scale_rewards="group",
        normalize_advantages=False,
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="grpo",
        epsilon_low=clip_range,
        epsilon_high=clip_range,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    scored = trainer_class._generate_and_score_completions(trainer, [{"prompt": prompt} for prompt in prompts])
    loss: Tensor = trainer_class._compute_loss(trainer, _Named("policy"), scored)
    advantages: Tensor = scored["advantages"]
    return advantages, loss


class _Named(torch.nn.Module):
    is_gradient_checkpointing = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def our_losses(
    objective: Objective,
    samples: Sequence[Sample],
    policy: Mapping[str, Tensor],
    given: Mapping[str, Mapping[str, Tensor]],
    constants: Mapping[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> Losses:
    """What an objective of ours says of samples whose log-probabilities under the policy are given."""
    flat = torch.cat([policy[sample.id] for sample in samples])
    monkeypatch.setattr(models, "response_token_logprobs", lambda model, batch: flat)
    return objective.loss(None, batch.collate(batch.whole(samples), given), constants)


def random_logprobs(samples: Sequence[Sample], seed: int, *, scale: float = 3.0) -> dict[str, Tensor]:
    """Log-probabilities of the response tokens of samples."""
    generator = torch.Generator().manual_seed(seed)
    return {sample.id: -scale * torch.rand(sample.response_tokens, generator=generator) for sample in samples}


def leaves(values: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors, such that gradients are wanted of them."""
    return [tensor.requires_grad_() for tensor in values.values()]


def assert_same(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> None:
    """Two scalars have the same value and the same gradients, to 1e-5."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for our, their in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
        assert their.abs().max() > 0
