"""The first reward model of a deployment, from a file.

    read ─▶ held out, by prompt ─▶ learn ─▶ judged now and then ─▶ the best is published, with its curves

It is judged between steps of one round, so that lengths are balanced over all pairs; where it gets no better the round
is left, and what it was at its best is taken.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from thumbwheel import errors, files
from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
from thumbwheel.checkpoints.store import SAMPLES, LocalStore, VerifiedVersion, version_name
from thumbwheel.heads import Heads
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, Lineage, ModelRole, Probe
from trainer import base, losses, publish, runtime
from trainer.encode import record_encoder
from trainer.reward import pairs as reading
from trainer.reward.config import InitSettings
from trainer.samples import Pair

if TYPE_CHECKING:
    from trainer.learner import Learner, StepReport

REWARD = ModelRole.MODEL_ROLE_REWARD

CURVES = "curves.json"
"""In the version: what the picture shows."""


class _Enough(Exception):
    """It gets no better."""


@dataclass
class Curves:
    """What was measured, by optimizer step."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    """Ranking loss of what was learnt, before the step."""
    judged: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Index of the judgement with the least loss."""
        return min(range(len(self.judged)), key=lambda index: self.judged[index][1]["heldout_loss"])

    def draw(self, path: Path) -> None:
        """As a picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(*zip(*self.loss, strict=True), color="0.7", label="learnt from")
        steps = [step for step, _ in self.judged]
        left.plot(steps, [found["heldout_loss"] for _, found in self.judged], "o-", label="held out")
        right.plot(steps, [found["heldout_accuracy"] for _, found in self.judged], "o-", label="accuracy, held out")
        right.plot(
            steps, [abs(found["length_correlation"]) for _, found in self.judged], "s--", label="|length correlation|"
        )
        right.axhline(0.5, color="0.8", zorder=0)
        for axes, title in ((left, "loss"), (right, "held-out pairs")):
            axes.axvline(steps[self.best], color="0.85", zorder=0)
            axes.set_xlabel("optimizer step")
            axes.set_title(title)
            axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def run(settings: InitSettings, stop: Callable[[], bool]) -> str:
    """Trains and publishes; returns the version. Raises what is wrong with the data, `errors.Conflict` where there is a
    trained reward model already, `errors.FailedPrecondition` where it has not learnt what people prefer, what
    `base.fetch` raises, and `Stopped`.
    """
    store, signer = _store(settings)
    trained = [manifest.version for manifest in store.versions(REWARD) if manifest.sequence]
    if trained:
        raise errors.Conflict(
            f"There is a reward model already: {trained[0]}.",
            remedy="The trainer goes on from it with every comparison; name another --home to begin anew.",
        )
    runtime.prepare(settings.threads)
    encoder_base = base.fetch(settings.base_model or None, progress=sys.stderr.isatty())
    found = reading.read(
        settings.data, record_encoder(encoder_base, settings.max_length), limit=settings.limit, stop=stop
    )
    train, heldout = reading.split(found, settings.heldout_share)
    start = _start(store, signer, encoder_base, found, settings)
    print(
        f"{len(train):,} pairs to learn from, {len(heldout):,} held out; heads: {', '.join(_heads(start.path).names)}"
    )
    picture = settings.curves or settings.home / f"{version_name(REWARD, 1)}.png"
    with tempfile.TemporaryDirectory(dir=settings.home, prefix=".reward-init-") as folder:
        curves, learner = _learn(start.path, train, heldout, settings, Path(folder), stop)
        curves.draw(picture)
        _require_learnt(curves, picture)
        probe = _probe(Path(folder), start.path)
        learner.close()
        version = _publish(store, signer, start, Path(folder), train, curves, probe, settings)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in curves.judged[curves.best][1].items())
    print(f"published {version}: {shown}\ncurves in {picture}")
    print(f"read it: thumbwheel reward report {version} --data {settings.data}")
    return version


def _store(settings: InitSettings) -> tuple[LocalStore, ManifestSigner]:
    keys = settings.home / "keys"
    if not keys.exists():
        create_keys(keys)
    return LocalStore(settings.home / "store", ManifestVerifier.load(keys)), ManifestSigner.load(keys)


def _start(
    store: LocalStore, signer: ManifestSigner, base_model: Path, found: Sequence[Pair], settings: InitSettings
) -> VerifiedVersion:
    """Version 0, which is made where there is none, with a head for every aspect that the data has."""
    aspects = sorted({aspect for pair in found for aspect, _ in pair.aspects})
    heads = Heads(tuple(dict.fromkeys([*settings.reward_aspects, *aspects])), settings.ensemble_heads)
    publish.ensure_base(base_model, store, signer, heads)
    start = store.load(version_name(REWARD, 0))
    if missing := [aspect for aspect in aspects if aspect not in _heads(start.path).aspects]:
        print(
            f"no head for {', '.join(missing)}, which {start.manifest.version} was made without: not learnt from",
            file=sys.stderr,
        )
    return start


def _heads(path: Path) -> Heads:
    from transformers import AutoConfig

    return Heads.of(AutoConfig.from_pretrained(str(path)).id2label)


def _learn(
    start: Path,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    settings: InitSettings,
    best: Path,
    stop: Callable[[], bool],
) -> tuple[Curves, Learner]:
    """Leaves the best model in `best`."""
    from trainer import progress
    from trainer.learner import Learner

    objective = losses.objective("reward", REWARD, settings, field="objective")
    learner, curves = Learner(objective, start, settings, learning_rate=settings.learning_rate), Curves()
    taught = [pair for pair in train if objective.learns_from(pair)]
    every = max(1, math.ceil(len(taught) / settings.batch_size) // settings.evaluations)

    def judge(step: int) -> None:
        curves.judged.append((step, learner.judge(heldout, stop).summary()))
        if curves.best == len(curves.judged) - 1:
            shutil.rmtree(best)
            best.mkdir()
            learner.write_model(best)
        elif len(curves.judged) - 1 - curves.best >= settings.patience:
            raise _Enough

    with progress.line("reward") as on_step:

        def report(step: StepReport) -> None:
            on_step(step)
            curves.loss.append((step.step, step.measures["ranking_loss"]))
            if step.step % every == 0 or step.step == step.steps:
                judge(step.step)
                if not sys.stderr.isatty():
                    told = curves.judged[-1][1]
                    print(
                        f"step {step.step} of {step.steps}: loss {step.loss:.3f}; held out: loss "
                        f"{told['heldout_loss']:.3f}, accuracy {told['heldout_accuracy']:.3f}",
                        flush=True,
                    )

        try:
            learner.learn(train, {}, round_number=1, stop=stop, on_step=report)
        except _Enough:
            step = curves.judged[curves.best][0]
            print(f"it got no better {settings.patience} times: the model of step {step} is taken")
    return curves, learner


def _require_learnt(curves: Curves, picture: Path) -> None:
    """Raises `errors.FailedPrecondition` for a model that is right no more often than a coin."""
    accuracy = curves.judged[curves.best][1]["heldout_accuracy"]
    if accuracy <= 0.5:
        raise errors.FailedPrecondition(
            f"At its best it agrees with {accuracy:.0%} of the held-out pairs, as a coin would: nothing is published.",
            remedy=f"Give it more pairs, --epochs or another --learning-rate; {picture} shows its curves.",
        )


def _probe(folder: Path, start: Path) -> Probe:
    from transformers import AutoTokenizer

    from trainer import models

    prompt, response = publish.scored_probe_tokens(AutoTokenizer.from_pretrained(str(start)))
    score = models.sequence_score(models.load_scorer(folder).eval(), [*prompt, *response])
    return Probe(prompt_token_ids=prompt, token_ids=response, score=score)


def _publish(
    store: LocalStore,
    signer: ManifestSigner,
    start: VerifiedVersion,
    best: Path,
    train: Sequence[Pair],
    curves: Curves,
    probe: Probe,
    settings: InitSettings,
) -> str:
    ids = "".join(f"{sample_id}\n" for sample_id in sorted(pair.id for pair in train))
    step, measured = curves.judged[curves.best]
    manifest = CheckpointManifest(
        version=version_name(REWARD, 1),
        role=REWARD,
        sequence=1,
        parent=start.manifest.version,
        base_model=start.manifest.base_model,
        lineage=Lineage(
            objective="reward",
            settings={
                name: str(value) for name, value in settings.model_dump(exclude={"home", "curves", "log_level"}).items()
            }
            | {"data_sha256": files.sha256(settings.data)},
            sample_count=len(train),
            samples_sha256=files.sha256_bytes(ids.encode()),
            code_version=publish.code_version(),
            steps=step,
        ),
        metrics=measured,
        probes=[probe],
    )
    manifest.created_at.GetCurrentTime()

    def write(folder: Path) -> None:
        shutil.copytree(best, folder, dirs_exist_ok=True)
        publish.copy_tokenizer(start, folder)
        (folder / SAMPLES).write_text(ids)
        (folder / CURVES).write_text(json.dumps({"loss": curves.loss, "judged": curves.judged}, indent=1))

    store.publish(manifest, write, signer)
    return manifest.version
