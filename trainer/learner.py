"""The learner: a model, its optimizer and an objective on DeepSpeed. bf16 weights, fp32 master weights.

    samples ─▶ steps ─▶ micro-batches ─▶ loss ─▶ gradients, added up in fp32 ─▶ clip ─▶ AdamW

A learner knows nothing of streams and versions. It is made, saved to and restored from a folder, and closed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from thumbwheel import errors
from trainer import batch as batches
from trainer import models, runtime
from trainer.buffer import Sample
from trainer.config import TrainerSettings
from trainer.losses import Objective

_TAG = "deepspeed"
_RANDOM = "random.safetensors"
_REFERENCE_FACTOR = 2
"""Without gradients, so many times the tokens fit."""

Reference = Mapping[str, tuple[float, float]]
"""Log-probabilities of chosen and rejected under the reference model, by sample id."""


class Stopped(Exception):
    """The process was asked to stop while it learnt. What was begun is given up; nothing of it is kept."""


@dataclass(frozen=True)
class StepReport:
    """A step that was done."""

    step: int
    """Of this round, from 1."""
    steps: int
    """In this round."""
    samples: int
    loss: float
    """Mean over the samples, before the step, as all that follow."""
    margin: float
    accuracy: float
    chosen_reward: float
    rejected_reward: float
    grad_norm: float
    """Before clipping."""


class Learner:
    """Trains the model in `path` by `objective`. Closing it frees all of its memory."""

    def __init__(
        self,
        objective: Objective,
        path: Path,
        settings: TrainerSettings,
        *,
        learning_rate: float,
        steps_done: int = 0,
    ) -> None:
        self._objective = objective
        self._settings = settings
        self._learning_rate = learning_rate
        self.steps_done = steps_done
        """Optimizer steps since the base model."""
        model = objective.load(path)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,  # no temporaries of the size of the model
        )
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(settings))
        self._model: Any = self._engine.module

    def learn(
        self,
        samples: Sequence[Sample],
        reference: Reference,
        *,
        round_number: int,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> dict[str, float]:
        """Learns from a round and returns its means. `reference` may be empty where the objective needs none.

        Raises `errors.Internal` at the first loss or gradient that is not finite, and `Stopped` as soon as `stop` says
        so; the learner is of no use after either.
        """
        settings, started = self._settings, time.perf_counter()
        plan = [
            step
            for epoch in range(settings.epochs)
            for step in batches.steps(
                samples, settings.batch_size, seed=settings.seed, round_number=round_number, epoch=epoch
            )
        ]
        reports = []
        for number, step in enumerate(plan, 1):
            report = self._step(step, reference, stop, number, len(plan))
            on_step(report)
            reports.append(report)
        total = sum(report.samples for report in reports)
        names = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "grad_norm")
        means = {name: sum(getattr(r, name) * r.samples for r in reports) / total for name in names}
        return means | {"learn_seconds": time.perf_counter() - started}

    def _step(
        self, samples: Sequence[Sample], reference: Reference, stop: Callable[[], bool], number: int, count: int
    ) -> StepReport:
        self._set_learning_rate()
        losses, margins, chosen, rejected = [], [], [], []
        for micro in batches.micro_batches(samples, self._settings.micro_batch_tokens):
            if stop():
                raise Stopped
            batch = batches.collate(micro).to(self._engine.device)
            with self._recomputing(batch.tokens > self._settings.micro_batch_tokens):
                pairs = self._objective.loss(self._model, batch, self._reference(micro, reference))
                loss = (pairs.losses * batch.weights).sum() / len(samples)
                self._require_finite("loss", loss.item())
                self._engine.backward(loss, scale_wrt_gas=False)
            losses += pairs.losses.detach().tolist()
            margins += (pairs.chosen_rewards - pairs.rejected_rewards).tolist()
            chosen += pairs.chosen_rewards.tolist()
            rejected += pairs.rejected_rewards.tolist()
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        self._require_finite("gradient norm", grad_norm)
        self.steps_done += 1
        size = len(samples)
        return StepReport(
            step=number,
            steps=count,
            samples=size,
            loss=sum(losses) / size,
            margin=sum(margins) / size,
            accuracy=sum(margin > 0 for margin in margins) / size,
            chosen_reward=sum(chosen) / size,
            rejected_reward=sum(rejected) / size,
            grad_norm=grad_norm,
        )

    def probe(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Log-probability of every token of `continuation` after `prompt`, for a policy."""
        return models.continuation_logprobs(self._model, prompt, continuation)

    def probe_score(self, tokens: Sequence[int]) -> float:
        """Score at the last of `tokens`, for a reward model."""
        return models.sequence_score(self._model, tokens)

    def write_model(self, folder: Path) -> None:
        """Writes weights (bf16, safetensors) and configuration, as Transformers reads them."""
        self._model.save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """Writes weights, master weights, optimizer and random state into `folder`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        save_file({"cpu": torch.get_rng_state()}, folder / _RANDOM)

    def restore(self, folder: Path) -> None:
        """Takes on the weights, optimizer and random state saved in `folder`, bit for bit; `steps_done` is the caller's
        to keep. Raises `errors.CorruptCheckpoint`.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise errors.CorruptCheckpoint(
                f"{folder} holds no state of this model.", remedy="Was it written with another base model?"
            )
        torch.set_rng_state(load_file(folder / _RANDOM)["cpu"])

    def close(self) -> None:
        """Frees everything."""
        self._engine.destroy()
        # Its hooks and its model refer to each other; without this the weights live on until some later collection.
        self._engine.optimizer = None
        self._engine.module = None
        self._engine = self._model = None
        runtime.free_memory()

    def _set_learning_rate(self) -> None:
        warmup = self._settings.warmup_steps
        factor = min(1.0, (self.steps_done + 1) / warmup) if warmup else 1.0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._learning_rate * factor

    def _reference(self, samples: Sequence[Sample], reference: Reference) -> Tensor | None:
        if not self._objective.needs_reference:
            return None
        pairs = [reference[sample.id] for sample in samples]
        values = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        return torch.tensor(values, dtype=torch.float32, device=self._engine.device)

    @contextlib.contextmanager
    def _recomputing(self, wanted: bool) -> Iterator[None]:
        """Activations are computed again in the backward pass: a third slower, and a long sample fits in memory."""
        if not wanted:
            yield
            return
        self._model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            self._model.gradient_checkpointing_disable()

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise errors.Internal(
                f"The {what} is {value} at step {self.steps_done + 1} of objective {self._objective.name}: this round "
                "is not published, and the last version stays as it is.",
                remedy=f"Lower the learning rate ({self._learning_rate:g}) or --max-grad-norm and start again.",
            )


@torch.no_grad()
def reference_logprobs(
    objective: Objective, path: Path, samples: Sequence[Sample], settings: TrainerSettings, stop: Callable[[], bool]
) -> Reference:
    """Log-probabilities of all samples under the model in `path`, which is loaded for it and freed again.

    Raises `Stopped`.
    """
    model = objective.load(path).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    found: dict[str, tuple[float, float]] = {}
    for micro in batches.micro_batches(samples, _REFERENCE_FACTOR * settings.micro_batch_tokens):
        if stop():
            raise Stopped
        values = models.response_logprobs(model, batches.collate(micro).to(device)).tolist()
        for index, sample in enumerate(micro):
            found[sample.id] = (values[index], values[len(micro) + index])
    del model
    runtime.free_memory()
    return found


def _config(settings: TrainerSettings) -> dict[str, Any]:
    return {
        # Micro-batches differ in size, so the end of a step is ours to say: with these three, `step()` is the end.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": True},
        # With stage 1 and fp32, DeepSpeed 0.19.8 adds up micro-batches wrongly (those before the last count again).
        "data_types": {"grad_accum_dtype": "fp32" if settings.zero_stage == 2 else "bf16"},
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
