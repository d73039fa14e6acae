"""Learning from a file: the same learner, without stream and versions. One round over all of it.

    read ─▶ tokens ─▶ plan ─▶ reference log-probabilities ─▶ learn ─▶ a folder as Transformers reads it
                       └─ with --dry-run this is all

The folder appears whole or not at all, with `training.json`, which says what it was made of.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thumbwheel import errors, files
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import base, dataset, losses, progress, runtime
from trainer.config import OfflineSettings
from trainer.encode import record_encoder
from trainer.samples import KINDS, Sample, kind_name

if TYPE_CHECKING:
    from trainer.learner import Learner, StepReport

logger = logging.getLogger(__name__)

TRAINING = "training.json"

_FIELD = "objective"


@dataclass(frozen=True)
class Plan:
    """What would be learnt from what."""

    terms: Mapping[str, float]
    """Weights of the objectives."""
    samples: tuple[Sample, ...]
    """What they learn from."""
    unused: Mapping[str, int]
    """How many samples of which kinds none of them learns from."""

    def lines(self, settings: OfflineSettings, base_model: Path) -> Iterator[tuple[str, str]]:
        """The plan in words: what it is about, and what is to be said about it."""
        yield "data", f"{settings.data}: {_counts(self.samples)}"
        for name, weight in self.terms.items():
            count = sum(isinstance(sample, losses.kind(name)) for sample in self.samples)
            kind = kind_name(losses.kind(name))
            yield "objective", f"{name}, weight {weight:g}: learns from {_number(count, kind)}"
        for kind, count in self.unused.items():
            users = [name for name, wanted in (losses.POLICY | losses.REWARD).items() if wanted is KINDS[kind]]
            yield "not used", f"{_number(count, kind)}: none of {', '.join(users)} is in the objective"
        yield "base model", str(base_model)
        prompts = [len(sample.prompt) for sample in self.samples]
        responses = [len(response) for sample in self.samples for response in sample.responses]
        yield "prompts", f"{_spread(prompts)} tokens"
        yield "responses", f"{_spread(responses)} tokens"
        steps = math.ceil(len(self.samples) / settings.batch_size)
        yield (
            "steps",
            f"{settings.epochs} × {steps}, of at most {settings.batch_size} samples, at learning rate "
            f"{settings.learning_rate:g}",
        )
        yield (
            "tokens",
            f"{sum(responses):,} learnt from and {sum(sample.tokens for sample in self.samples):,} computed in each "
            "pass, prompts of several responses once, without padding",
        )
        yield "output", str(settings.output_path)


def run(settings: OfflineSettings, stop: Callable[[], bool]) -> None:
    """Learns, or says what would be learnt. Raises what is wrong with the settings or the data, `errors.Conflict` where
    the output exists, what `base.fetch` raises, and `Stopped`.
    """
    role = losses.role_of(settings.objective)
    if settings.adapter and (not settings.lora_rank or role == ModelRole.MODEL_ROLE_REWARD):
        raise errors.InvalidArgument(
            "is set, but there is none to write.", field="adapter", remedy="Set --lora-rank, and a policy's objective."
        )
    terms = losses.parse(settings.objective, role, field=_FIELD)
    records = dataset.read(settings.data, limit=settings.limit)
    if settings.output_path.exists():
        raise errors.Conflict(f"{settings.output_path} is there already.", remedy="Name another folder by --output.")
    base_model = base.fetch(settings.base_model or None, progress=sys.stderr.isatty())
    plan = _plan(terms, records, base_model, settings, stop)
    say = print if runtime.is_lead() else _nothing
    for about, text in plan.lines(settings, base_model):
        say(f"{about:<12}{text}", flush=True)
    if settings.dry_run:
        say("Nothing was learnt: this was a dry run.")
        return
    with _start(base_model, role) as start:
        measured = _learn(plan.samples, start, settings, role, stop)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    say(f"{'learnt':<12}{shown}\n{'written':<12}{settings.output_path}")


def _nothing(*_: object, **__: object) -> None:
    """What ranks but the first say."""


def _plan(
    terms: Mapping[str, float],
    records: Sequence[dataset.Record],
    base_model: Path,
    settings: OfflineSettings,
    stop: Callable[[], bool],
) -> Plan:
    kinds = {losses.kind(name) for name in terms}
    unused: dict[str, int] = {}
    for record in records:
        if record.kind not in kinds:
            unused[kind_name(record.kind)] = unused.get(kind_name(record.kind), 0) + 1
    wanted = [record for record in records if record.kind in kinds]
    if not wanted:
        names = [name for name, kind in (losses.POLICY | losses.REWARD).items() if kind_name(kind) in unused]
        raise errors.InvalidArgument(
            f"is {settings.objective!r}, which learns from none of the lines of {settings.data}: they are "
            f"{' and '.join(_number(count, kind) for kind, count in unused.items())}.",
            field=_FIELD,
            remedy=f"Use one of {', '.join(names)}.",
        )
    encoder = record_encoder(base_model, settings.max_length)
    samples = []
    for record in wanted:
        if stop():
            raise runtime.Stopped
        samples.append(encoder.sample(record))
    return Plan(terms, tuple(samples), unused)


@contextmanager
def _start(base_model: Path, role: ModelRole.ValueType) -> Iterator[Path]:
    """The folder to begin from: the base model, or for a reward model that it is not yet, its body with a new head."""
    from trainer import publish

    architectures = json.loads((base_model / "config.json").read_text()).get("architectures") or [""]
    if role == ModelRole.MODEL_ROLE_POLICY or architectures[0].endswith("ForSequenceClassification"):
        yield base_model
        return
    with tempfile.TemporaryDirectory() as folder:
        publish.write_scorer(base_model, Path(folder))
        yield Path(folder)


def _learn(
    samples: Sequence[Sample],
    start: Path,
    settings: OfflineSettings,
    role: ModelRole.ValueType,
    stop: Callable[[], bool],
) -> dict[str, float]:
    runtime.prepare(settings.threads)
    from trainer.inference import reference_logprobs
    from trainer.learner import Learner

    objective = losses.objective(settings.objective, role, settings, field=_FIELD)
    wanted = objective.referenced(samples)
    budget = runtime.pass_tokens(settings.micro_batch_tokens)
    reference = reference_logprobs(start, wanted, max_tokens=budget, stop=stop) if wanted else {}
    learner = Learner(objective, start, settings, learning_rate=settings.learning_rate)
    lead = runtime.is_lead()
    with progress.line(settings.objective) as on_step:

        def report(step: StepReport) -> None:
            if lead and not sys.stderr.isatty():
                logger.info("step", extra=progress.fields(step))
            if lead:
                on_step(step)

        measured = learner.learn(samples, reference, round_number=1, stop=stop, on_step=report)
    if lead:
        _write(learner, start, settings, {"counts": _by_kind(samples), "metrics": measured, **_lineage(settings)})
    else:
        learner.write_model(Path())  # it takes part, and writes nothing
    learner.close()
    return measured


def _write(learner: Learner, start: Path, settings: OfflineSettings, training: Mapping[str, object]) -> None:
    """Writes the folder under another name, and renames it when it is whole."""
    from transformers import AutoTokenizer

    output = settings.output_path
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        with files.space_errors(output.parent, files.tree_size(start), f"the model ({output.name})"):
            if settings.adapter:
                learner.write_adapter(staging)
            else:
                learner.write_model(staging)
            AutoTokenizer.from_pretrained(str(start)).save_pretrained(staging)
            if (start / "generation_config.json").exists():
                shutil.copyfile(start / "generation_config.json", staging / "generation_config.json")
            (staging / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
            # It is the user's, unlike what a store holds: others may read it.
            staging.chmod(0o755)
            for file in staging.iterdir():
                file.chmod(0o644)
            files.sync_tree(staging)
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _lineage(settings: OfflineSettings) -> dict[str, object]:
    from trainer.publish import code_version

    return {
        "objective": settings.objective,
        "settings": settings.model_dump(mode="json", exclude={"dry_run", "log_level"}),
        "data_sha256": files.sha256(settings.data),
        "code_version": code_version(),
    }


def _by_kind(samples: Sequence[Sample]) -> dict[str, int]:
    return {
        name: count for name, kind in KINDS.items() if (count := sum(isinstance(sample, kind) for sample in samples))
    }


def _counts(samples: Sequence[Sample]) -> str:
    return ", ".join(_number(count, name) for name, count in _by_kind(samples).items())


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _spread(lengths: Sequence[int]) -> str:
    return f"{min(lengths):,} to {max(lengths):,}, median {statistics.median(lengths):,.0f}"
