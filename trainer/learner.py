"""The learner: a model, its optimizer and an objective. bf16 weights, fp32 master weights, any number of ranks.

    samples ─▶ prepared, without gradient ─▶ steps ─▶ micro-batches ─▶ loss ─▶ gradients, added up in fp32 ─▶ AdamW

A learner knows nothing of streams and versions. It is made, saved to and restored from a folder, and closed. Of several
ranks, all make one, and call its methods with the same arguments in the same order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thumbwheel import errors
from thumbwheel.heads import Heads
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import batch as batches
from trainer import inference, judge, lora, models, ranks, runtime, shards
from trainer.background import Background
from trainer.batch import Batch
from trainer.config import LearningSettings
from trainer.engine import Engine
from trainer.guards import Unfit
from trainer.judge import Judged
from trainer.losses.base import PerSample, Prepared, Round, units
from trainer.losses.mixture import Mixture, Term
from trainer.samples import Pair, Sample
from trainer.saving import Saver

_RANDOM = "random"
_EXPLODED = 1e6
"""A loss or a gradient beyond this is as bad as one that is no number: what comes of it is no model any more."""


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
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What took how long: `gradients`, and `optimizer` with the reduction over ranks before it."""

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
        self._budget = runtime.pass_tokens(settings.micro_batch_tokens)
        self.steps_done = steps_done
        """Optimizer steps since the base model."""
        self._states = {term.objective.name: term.objective.initial_state() for term in objective.terms}
        self._model: Any = objective.load(path)
        if settings.lora_rank:
            lora.add(self._model, settings)
        self._shapes = {name: list(p.shape) for name, p in self._model.named_parameters() if p.requires_grad}
        self._groups = objective.parameter_groups(self._model, learning_rate)
        self._engine = Engine(self._model, self._groups, settings)
        if settings.lora_rank and self._engine.stage == 3:
            raise errors.FailedPrecondition("LoRA learns at ZeRO stages 0 to 2.", remedy="Lower --zero-stage.")
        self.saver = Saver()

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

        Raises `errors.FailedPrecondition` where the objective learns from none of the samples, `guards.Unfit` at the
        first loss or gradient that is not finite, or exploded, and `Stopped` as soon as `stop` says so; the learner is
        of no use after either of these two.
        """
        self.saver.hurry()  # the first step is going to wait for it
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
                samples,
                settings.batch_size,
                seed=settings.seed,
                round_number=round_number,
                epoch=epoch,
                stratum=self._objective.stratum,
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
                state = term.objective.next_state(self._states[name], found, count)
                self._states[name] = state | dict(prepared[name].state)
                measured |= self._named(term, found)
        return measured | _means(reports) | {"learn_seconds": time.perf_counter() - started}

    def _prepare(
        self, samples: Sequence[Sample], reference: PerSample, steps: int, stop: Callable[[], bool]
    ) -> tuple[dict[str, Round], dict[str, Prepared]]:
        """What the objectives work out for a round, by the names of those that have something to learn."""

        def evaluate(function: Callable[[Any, Batch], Tensor], wanted: Sequence[Sample]) -> dict[str, Tensor]:
            return inference.per_token(
                lambda batch: self._engine.call(function, batch),
                wanted,
                device=self._engine.device,
                max_tokens=self._budget,
                stop=stop,
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
        if ranks.count() > 1 and ranks.any_of(stop()):
            raise runtime.Stopped
        total, measured, began = 0.0, dict[str, float](), time.perf_counter()
        with self._engine.accumulating():
            for term in self._objective.terms:
                if mine := term.mine(samples):
                    name = term.objective.name
                    loss, measures = self._accumulate(term, mine, rounds[name], prepared[name], stop)
                    total += term.weight * loss
                    measured |= self._named(term, {"loss": loss, **measures})
        # What is being saved is read out of the memory that the optimizer is about to change.
        self.saver.captured.wait()
        computed = time.perf_counter()
        grad_norm = self._engine.step(self._learning_rates((number - 1) / count))
        self._require_finite("gradient norm", grad_norm)
        self.steps_done += 1
        seconds = {"gradients": computed - began, "optimizer": time.perf_counter() - computed}
        return StepReport(number, count, len(samples), total, grad_norm, measured, seconds)

    def _accumulate(
        self, term: Term, samples: Sequence[Sample], round: Round, prepared: Prepared, stop: Callable[[], bool]
    ) -> tuple[float, dict[str, float]]:
        """Adds the gradient of one term of a step to the others'. Returns its mean loss and measures, of all ranks."""
        objective, budget = term.objective, self._budget
        constants = {**prepared.constants, **objective.before_step(round, samples)}
        given = {"reference": round.reference, **prepared.given} if round.reference else prepared.given
        size = sum(map(units, samples))
        total, measures = 0.0, dict[str, list[float]]()
        for rows, counts in batches.shared(samples, budget, ranks.rank(), ranks.count()):
            if ranks.count() == 1 and stop():
                raise runtime.Stopped
            batch = batches.collate(rows, given).to(self._engine.device)
            with self._recomputing(self._settings.gradient_checkpointing or batch.tokens > budget):
                found = self._engine.call(objective.loss, batch, constants)
                loss = (found.losses * found.weights).sum() * term.weight / size
                self._engine.backward(loss * counts)
            if counts:
                total += found.losses.detach().sum().item()
                for name, values in found.measures.items():
                    _add(measures, name, values.sum().item(), values.numel())
        everywhere = dict[str, list[float]]()
        for loss_there, measures_there in ranks.gather([total, measures]):
            _add(everywhere, "", loss_there, 0)
            for name, (value, number) in measures_there.items():
                _add(everywhere, name, value, number)
        mean_loss = everywhere.pop("")[0] / size
        self._require_finite("loss", mean_loss)
        return mean_loss, {name: value / number for name, (value, number) in everywhere.items() if number}

    def probe(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Log-probability of every token of `continuation` after `prompt`, for a policy."""
        return self._engine.call(models.continuation_logprobs, prompt, continuation)

    def probe_score(self, tokens: Sequence[int]) -> float:
        """Score at the last of `tokens`, for a reward model."""
        return self._engine.call(models.sequence_score, tokens)

    def judge(self, pairs: Sequence[Pair], stop: Callable[[], bool] = lambda: False) -> Judged:
        """What a reward model says of pairs that it does not learn from. Raises `Stopped`."""
        return judge.judge(
            lambda batch: self._engine.call(models.head_scores, batch),
            Heads.of(self._model.config.id2label),
            pairs,
            device=self._engine.device,
            max_tokens=self._budget,
            stop=stop,
        )

    def write_model(self, folder: Path) -> None:
        """Writes weights (bf16, safetensors) and configuration, as Transformers reads them. Rank 0 does; with stage 3
        it holds them all meanwhile, once, and no other rank more than one parameter.
        """
        if self._engine.stage < 3:
            if ranks.lead():
                self._write_whole(folder)
            return
        saved = self._model.state_dict().keys()
        state = {name: buffer for name, buffer in self._model.named_buffers() if name in saved}
        for name, _ in self._model.named_parameters():
            with self._engine.gathered(name) as weights:
                if ranks.lead():
                    state[name] = weights.cpu().clone()
        if ranks.lead():
            self._model.save_pretrained(folder, state_dict=state)

    def write_adapter(self, folder: Path) -> None:
        """Writes LoRA's matrices alone, as peft reads them. Rank 0 does."""
        if ranks.lead():
            lora.write_adapter(self._model, folder)

    def _write_whole(self, folder: Path) -> None:
        self._model.save_pretrained(folder, state_dict=lora.merged(self._model) if self._settings.lora_rank else None)

    def save(self, folder: Path, model: Path | None = None, *, grace: float = 0.0) -> Background:
        """Writes master weights, optimizer, random state and the objectives' states into `folder`, and the model, as
        `write_model` does, into `model`, a policy's LoRA by itself below it too, in the background; wait for the end of
        what it returns; the model is there sooner, when `saver.model_saved` is done, and for `grace` seconds after that
        nothing is written, unless somebody is in a hurry. Meanwhile the learner may learn: its next step of the
        optimizer waits until all is read out of memory.
        """
        together = self._engine.stage == 3  # then all ranks have to take part, here and now
        self.saver.wait()
        if model is not None and together:
            self.write_model(model)

        def write_model() -> None:
            if model is not None and ranks.lead() and not together:
                self._write_whole(model)
                if self._settings.lora_rank and self._objective.role == ModelRole.MODEL_ROLE_POLICY:
                    (model / lora.FOLDER).mkdir()
                    lora.write_adapter(self._model, model / lora.FOLDER)

        index = {
            "files": 1 if self._engine.stage == 0 else ranks.count(),
            "shapes": self._shapes,
            "optimizer_steps": self._engine.optimizer_steps,
            "objectives": self._states,
        }
        more = {_RANDOM: torch.get_rng_state().clone()}
        return self.saver.save(folder, self._engine.fragments(), more, index, write_model, grace)

    def restore(self, folder: Path) -> None:
        """Takes on the weights, optimizer and random state saved in `folder` by any number of ranks, at any stage, bit
        for bit; `steps_done` is the caller's to keep. Raises `errors.CorruptCheckpoint`.
        """
        found = shards.Shards(folder)
        if {name: list(shape) for name, shape in found.shapes.items()} != self._shapes:
            raise errors.CorruptCheckpoint(
                f"{folder} holds no state of this model.", remedy="Was it written with another base model?"
            )
        for fragment in self._engine.fragments():
            found.fill(fragment)
        self._engine.restored(found.index["optimizer_steps"])
        torch.set_rng_state(found.more(_RANDOM, ranks.rank()))
        self._states |= found.index["objectives"]

    def close(self) -> None:
        """Frees everything, when all that is being saved is written."""
        try:
            self.saver.close()
        finally:
            self._engine.close()
            self._model = None
            runtime.free_memory()

    def _learning_rates(self, done: float) -> list[float]:
        """Of the parameter groups, where so much of the round, from 0 to 1, is `done`."""
        warmup = self._settings.warmup_steps
        factor = min(1.0, (self.steps_done + 1) / warmup) if warmup else 1.0
        if self._settings.learning_rate_decay == "linear":
            factor *= 1 - done
        return [0.0 if self.steps_done < group.frozen_steps else group.learning_rate * factor for group in self._groups]

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
        # What is no number is not less than anything.
        if not abs(value) < _EXPLODED:
            rate = self._groups[0].learning_rate
            raise Unfit(
                f"The {what} is {value} at step {self.steps_done + 1} of objective {self._objective.name}: this round "
                "is not published, and the last version stays as it is.",
                reason="not_finite",
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


def _add(sums: dict[str, list[float]], name: str, value: float, number: int) -> None:
    """Adds to a sum, and to what it is of."""
    found = sums.setdefault(name, [0.0, 0])
    found[0] += value
    found[1] += number
