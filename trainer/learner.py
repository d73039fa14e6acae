"""The learner: a model, its optimizer and an objective on DeepSpeed. bf16 weights, fp32 master weights.

    samples ─▶ prepared, without gradient ─▶ steps ─▶ micro-batches ─▶ loss ─▶ gradients, added up in fp32 ─▶ AdamW

A learner knows nothing of streams and versions. It is made, saved to and restored from a folder, and closed.
"""

from __future__ import annotations

import contextlib
import json
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
from trainer import inference, models, runtime
from trainer.batch import Batch
from trainer.config import LearningSettings
from trainer.losses.base import PerSample, Prepared, Round, units
from trainer.losses.mixture import Mixture, Term
from trainer.samples import Sample

_TAG = "deepspeed"
_RANDOM = "random.safetensors"
_OBJECTIVES = "objectives.json"


@dataclass(frozen=True)
class StepReport:
    """A step that was done."""

    step: int
    """Of this round, from 1."""
    steps: int
    """In this round."""
    samples: int
    loss: float
    """Weighted sum of the objectives' means, before the step, as all that follow."""
    grad_norm: float
    """Before clipping."""
    measures: Mapping[str, float]
    """What the objective measured, such as `margin`; in a mixture `dpo_margin`, and `dpo_loss`, and so on."""

    def numbers(self) -> dict[str, float]:
        """Everything that can be averaged over steps."""
        return {"loss": self.loss, **self.measures, "grad_norm": self.grad_norm}


class Learner:
    """Trains the model in `path` by `objective`. Closing it frees all of its memory."""

    def __init__(
        self,
        objective: Mixture,
        path: Path,
        settings: LearningSettings,
        *,
        learning_rate: float,
        steps_done: int = 0,
    ) -> None:
        self._objective = objective
        self._settings = settings
        self.steps_done = steps_done
        """Optimizer steps since the base model."""
        self._states = {term.objective.name: term.objective.initial_state() for term in objective.terms}
        model = objective.load(path)
        self._groups = objective.parameter_groups(model, learning_rate)
        optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "lr": group.learning_rate} for group in self._groups],
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
        reference: PerSample,
        *,
        round_number: int,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> dict[str, float]:
        """Learns from a round and returns its means. `reference` has the log-probabilities, under the reference model,
        of what `Mixture.referenced` names; it may be empty where the objective needs none.

        Raises `errors.FailedPrecondition` where the objective learns from none of the samples, `errors.Internal` at the
        first loss or gradient that is not finite, and `Stopped` as soon as `stop` says so; the learner is of no use
        after either of these two.
        """
        settings, started = self._settings, time.perf_counter()
        samples = [sample for sample in samples if self._objective.learns_from(sample)]
        if not samples:
            raise errors.FailedPrecondition(
                f"None of the samples is of a kind that {self._objective.name} learns from.",
                remedy="Choose another objective.",
            )
        plan = [
            step
            for epoch in range(settings.epochs)
            for step in batches.steps(
                samples, settings.batch_size, seed=settings.seed, round_number=round_number, epoch=epoch
            )
        ]
        rounds, prepared = self._prepare(samples, reference, len(plan), stop)
        reports = []
        for number, step in enumerate(plan, 1):
            report = self._step(step, rounds, prepared, stop, number, len(plan))
            on_step(report)
            reports.append(report)
        measured: dict[str, float] = {}
        for term in self._objective.terms:
            if (name := term.objective.name) in rounds:
                found, count = prepared[name].measures, sum(map(units, rounds[name].samples))
                self._states[name] = term.objective.next_state(self._states[name], found, count)
                measured |= self._named(term, found)
        return measured | _means(reports) | {"learn_seconds": time.perf_counter() - started}

    def _prepare(
        self, samples: Sequence[Sample], reference: PerSample, steps: int, stop: Callable[[], bool]
    ) -> tuple[dict[str, Round], dict[str, Prepared]]:
        """What the objectives work out for a round, by the names of those that have something to learn."""

        def evaluate(function: Callable[[Any, Batch], Tensor], wanted: Sequence[Sample]) -> dict[str, Tensor]:
            return inference.per_token(
                function, self._model, wanted, max_tokens=self._settings.micro_batch_tokens, stop=stop
            )

        rounds, prepared = {}, {}
        for term in self._objective.terms:
            if mine := term.mine(samples):
                name = term.objective.name
                rounds[name] = Round(mine, reference, steps, evaluate, self._states[name])
                prepared[name] = term.objective.prepare(rounds[name])
        return rounds, prepared

    def _step(
        self,
        samples: Sequence[Sample],
        rounds: Mapping[str, Round],
        prepared: Mapping[str, Prepared],
        stop: Callable[[], bool],
        number: int,
        count: int,
    ) -> StepReport:
        self._set_learning_rates()
        total, measured = 0.0, dict[str, float]()
        for term in self._objective.terms:
            if mine := term.mine(samples):
                name = term.objective.name
                loss, measures = self._accumulate(term, mine, rounds[name], prepared[name], stop)
                total += term.weight * loss
                measured |= self._named(term, {"loss": loss, **measures})
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        self._require_finite("gradient norm", grad_norm)
        self.steps_done += 1
        return StepReport(number, count, len(samples), total, grad_norm, measured)

    def _accumulate(
        self, term: Term, samples: Sequence[Sample], round: Round, prepared: Prepared, stop: Callable[[], bool]
    ) -> tuple[float, dict[str, float]]:
        """Adds the gradient of one term of a step to the others'. Returns its mean loss and measures."""
        objective, budget = term.objective, self._settings.micro_batch_tokens
        constants = {**prepared.constants, **objective.before_step(round, samples)}
        given = {"reference": round.reference, **prepared.given} if round.reference else prepared.given
        size = sum(map(units, samples))
        losses: list[float] = []
        measures: dict[str, list[float]] = {}
        for micro in batches.micro_batches(samples, budget):
            if stop():
                raise runtime.Stopped
            batch = batches.collate(micro, given).to(self._engine.device)
            with self._recomputing(batch.tokens > budget):
                found = objective.loss(self._model, batch, constants)
                loss = (found.losses * found.weights).sum() * term.weight / size
                self._require_finite("loss", loss.item())
                self._engine.backward(loss, scale_wrt_gas=False)
            losses += found.losses.detach().tolist()
            for name, values in found.measures.items():
                measures.setdefault(name, []).extend(values.tolist())
        means = {name: sum(values) / len(values) for name, values in measures.items() if values}
        return sum(losses) / size, means

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
        """Writes weights, master weights, optimizer, random state and the objectives' states into `folder`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        save_file({"cpu": torch.get_rng_state()}, folder / _RANDOM)
        (folder / _OBJECTIVES).write_text(json.dumps(self._states))

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
        # Checkpoints of the first release have none; its one objective had no state.
        if (states := folder / _OBJECTIVES).exists():
            self._states |= json.loads(states.read_text())

    def close(self) -> None:
        """Frees everything."""
        self._engine.destroy()
        # Its hooks and its model refer to each other; without this the weights live on until some later collection.
        self._engine.optimizer = None
        self._engine.module = None
        self._engine = self._model = None
        runtime.free_memory()

    def _set_learning_rates(self) -> None:
        warmup = self._settings.warmup_steps
        factor = min(1.0, (self.steps_done + 1) / warmup) if warmup else 1.0
        for group, wanted in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            frozen = self.steps_done < wanted.frozen_steps
            group["lr"] = 0.0 if frozen else wanted.learning_rate * factor

    def _named(self, term: Term, measures: Mapping[str, float]) -> dict[str, float]:
        """Measures as they are reported: in a mixture, each under the objective's name."""
        if len(self._objective.terms) == 1:
            return {name: value for name, value in measures.items() if name != "loss"}
        return {f"{term.objective.name}_{name}": value for name, value in measures.items()}

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
            rate = self._groups[0].learning_rate
            raise errors.Internal(
                f"The {what} is {value} at step {self.steps_done + 1} of objective {self._objective.name}: this round "
                "is not published, and the last version stays as it is.",
                remedy=f"Lower the learning rate ({rate:g}) or --max-grad-norm and start again.",
            )


def _means(reports: Sequence[StepReport]) -> dict[str, float]:
    """Means over the samples of the steps in which a number was measured."""
    found: dict[str, list[tuple[float, int]]] = {}
    for report in reports:
        for name, value in report.numbers().items():
            found.setdefault(name, []).append((value, report.samples))
    return {
        name: sum(value * samples for value, samples in values) / sum(samples for _, samples in values)
        for name, values in found.items()
    }


def _config(settings: LearningSettings) -> dict[str, Any]:
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
