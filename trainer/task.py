"""A task: one role's model learning from the stream. The verbs of the loop, and what has to survive between them.

Everything that must survive lies in one training checkpoint: weights, optimizer, random state, what waits, what was
seen, offsets, and which version it stands for. Between rounds a task *is* its newest checkpoint; only where it is alone
in the process does its learner stay in memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from thumbwheel import errors, files, tracing
from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints.store import LocalStore, VerifiedVersion, version_name
from thumbwheel.stream.log import Log, Producer, TopicPartition
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, Lineage, ModelRole, OffsetRange, Probe
from trainer import losses, metrics, progress, publish
from trainer.buffer import Buffer
from trainer.checkpoint import TrainingCheckpoints
from trainer.config import TaskName, TrainerSettings
from trainer.ingest import Encoder, Ingest
from trainer.publish import SAMPLES, Publisher
from trainer.samples import Pair, Sample

if TYPE_CHECKING:
    from trainer.learner import Learner, StepReport
    from trainer.losses.mixture import Mixture

logger = logging.getLogger(__name__)

STATE = "state.json"
VERSION = "version.json"


@dataclass(frozen=True)
class Shared:
    """What the tasks of a process share."""

    settings: TrainerSettings
    log: Log
    producer: Producer
    store: LocalStore
    signer: ManifestSigner
    stop: threading.Event


@dataclass(frozen=True)
class State:
    """How far a task is, as of its newest training checkpoint."""

    round: int
    steps: int
    version: str
    """The version that the weights are, or are to be published as."""
    positions: dict[TopicPartition, int]
    topic_ids: dict[str, str]

    def to_json(self) -> str:
        """As it lies in a checkpoint."""
        fields = dataclasses.asdict(self)
        fields["positions"] = [[*tp, offset] for tp, offset in sorted(self.positions.items())]
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> State:
        """Reads `to_json`."""
        fields = json.loads(text)
        fields["positions"] = {TopicPartition(topic, part): offset for topic, part, offset in fields["positions"]}
        return cls(**fields)


class Task:
    """One of the trainer's tasks, as its newest training checkpoint left it. `resume` comes first, once.

    Raises `errors.MissingModel` where there is no version 0, and `errors.CorruptCheckpoint`.
    """

    def __init__(self, name: TaskName, shared: Shared, *, resident: bool) -> None:
        settings = shared.settings
        self.name = name
        self._shared = shared
        self._resident = resident
        self._objective = _objective(name, settings)
        self._checkpoints = TrainingCheckpoints(settings.training_path / name, keep=settings.keep_checkpoints)
        self._publisher = Publisher(shared.store, shared.signer, shared.producer, shared.stop, task=name)
        self._base = self._load_base()
        self._encoder = Encoder(
            self._base.path, max_length=settings.max_length, scores_text=self._objective.scores_text
        )
        self._retracted: list[str] = []
        self._learnt: Sequence[Sample] = ()
        self._began = 0.0
        self._learner: Learner | None = None
        self._folder = self._checkpoints.newest()
        self._state, self._buffer = self._load(self._folder) if self._folder else self._begin()
        self._ingest = Ingest(
            shared.log,
            shared.producer,
            self._encoder,
            task=name,
            start=self._state.positions,
            topic_ids=self._state.topic_ids,
        )

    def resume(self) -> None:
        """Announces the version that this task goes on from; publishes it first, where a crash came in between."""
        logger.info("resumed", extra={"task": self.name, "version": self._state.version, "round": self._state.round})
        if self._folder is not None:
            self.publish()
        else:
            self._publisher.announce(self._shared.store.load(self._state.version))

    def ingest(self, timeout: float) -> None:
        """Takes comparisons in from the stream, waiting up to `timeout` seconds for the first."""
        self._retracted += self._ingest.read(self._buffer, timeout)

    def due(self) -> bool:
        """True where a round is to start."""
        settings = self._shared.settings
        return self._buffer.due(
            time.monotonic(),
            round_size=settings.round_size,
            min_round_size=settings.min_round_size,
            max_wait=settings.max_wait_seconds,
        )

    def batch(self) -> list[Sample]:
        """The samples of the next round, oldest first."""
        return self._buffer.oldest(self._shared.settings.round_size)

    def learn(self, samples: Sequence[Sample], on_step: Callable[[StepReport], None]) -> dict[str, float]:
        """Learns from a round; returns its measurements. Raises `Stopped`, and `errors.Internal` where it diverges."""
        from trainer.inference import reference_logprobs

        stop, settings = self._shared.stop.is_set, self._shared.settings
        reference: Any = {}
        self._began = time.time()
        logger.info("round begins", extra={"task": self.name, "round": self._state.round + 1, "samples": len(samples)})
        if self._objective.needs_reference:
            with self._phase("reference"):
                reference = reference_logprobs(
                    self._base.path,
                    self._objective.referenced(samples),
                    max_tokens=settings.micro_batch_tokens,
                    stop=stop,
                )
        with self._phase("restore"):
            learner = self._restored()
        with self._phase("learn"):
            return learner.learn(
                samples,
                reference,
                round_number=self._state.round + 1,
                stop=stop,
                on_step=lambda report: self._report(report, on_step),
            )

    def checkpoint(self, samples: Sequence[Sample], measured: dict[str, float]) -> None:
        """Makes what was learnt durable, together with everything it depends on: from here on it is never learnt again.

        Raises `errors.NoSpace`.
        """
        learner = self._restored()
        self._buffer.learnt(sample.id for sample in samples)
        newest = self._shared.store.latest(self._objective.role)
        state = State(
            round=self._state.round + 1,
            steps=learner.steps_done,
            # Above what is in the store even where an older training checkpoint had to be used: names are used once.
            version=version_name(self._objective.role, (newest.sequence if newest else 0) + 1),
            positions=self._ingest.positions(),
            topic_ids=self._ingest.topic_ids(),
        )
        ids = "".join(f"{sample_id}\n" for sample_id in sorted(sample.id for sample in samples))
        manifest = self._manifest(state, len(samples), ids, measured)

        def fill(folder: Path) -> None:
            learner.save(folder).wait()
            self._buffer.save(folder)
            (folder / STATE).write_text(state.to_json())
            (folder / VERSION).write_text(json_format.MessageToJson(manifest))
            (folder / SAMPLES).write_text(ids)

        with self._phase("checkpoint"):
            self._folder = self._checkpoints.write(state.round, fill)
        self._state, self._retracted, self._learnt = state, [], samples
        metrics.ROUNDS.labels(self.name).inc()
        metrics.LEARNT.labels(self.name).inc(len(samples))
        metrics.PENDING.labels(self.name).set(len(self._buffer))

    def publish(self) -> None:
        """Publishes the version that the newest training checkpoint stands for, and announces it. May be done again."""
        assert self._folder is not None, "there is nothing to publish before the first checkpoint"
        manifest = json_format.Parse((self._folder / VERSION).read_text(), CheckpointManifest())
        with self._phase("publish"):
            version = self._publisher.publish(manifest, lambda folder: self._write(folder, manifest.parent))
            if not self._resident:
                self._release()
            announced = self._publisher.announce(version, [sample.received_at for sample in self._learnt])
            within = tracing.traceparent()
        if announced:
            for sample in self._learnt:
                if sample.received_at:
                    metrics.FEEDBACK_TO_PUBLISH.labels(self.name).observe(max(0.0, time.time() - sample.received_at))
                # So that the trace of a click ends with the version that learnt from it, and leads on to its own.
                tracing.record(
                    "trainer.learnt",
                    parent=sample.traceparent,
                    began=self._began,
                    links=[within],
                    task=self.name,
                    version=manifest.version,
                )
        self._learnt = ()

    def commit(self) -> None:
        """Tells the broker how far this task is, for monitoring lag; nothing ever starts from it."""
        self._ingest.commit(self._state.positions)

    def close(self) -> None:
        """Lets go of everything."""
        self._release()
        self._ingest.close()

    def _load_base(self) -> VerifiedVersion:
        version = version_name(self._objective.role, 0)
        try:
            return self._shared.store.load(version)
        except errors.NotFound as error:
            raise errors.MissingModel(
                f"There is no {version} in {self._shared.store.root} to begin from.",
                remedy="Type `python -m trainer --init-only` first.",
            ) from error

    def _load(self, folder: Path) -> tuple[State, Buffer]:
        return State.from_json((folder / STATE).read_text()), Buffer.load(folder, time.monotonic())

    def _begin(self) -> tuple[State, Buffer]:
        """The state where there is no training checkpoint: that of the newest version, with a fresh optimizer."""
        versions = self._shared.store.versions(self._objective.role)
        buffer = Buffer()
        for manifest in versions:
            if manifest.sequence:
                # Its training checkpoint is gone, but what it learnt from is known, and is not learnt again.
                buffer.learnt((self._shared.store.load(manifest.version).path / SAMPLES).read_text().split())
        newest = versions[0]
        if newest.sequence:
            logger.warning(
                "no training checkpoint: beginning from the newest version, with a fresh optimizer",
                extra={"task": self.name, "version": newest.version},
            )
        return State(round=0, steps=newest.lineage.steps, version=newest.version, positions={}, topic_ids={}), buffer

    def _restored(self) -> Learner:
        """The learner, made from the newest training checkpoint where it is not in memory."""
        if self._learner is None:
            from trainer.learner import Learner

            settings = self._shared.settings
            start = self._base.path if self._folder else self._shared.store.load(self._state.version).path
            learner = Learner(
                self._objective,
                start,
                settings,
                learning_rate=settings.learning_rate(self.name),
                steps_done=self._state.steps,
            )
            if self._folder is not None:
                learner.restore(self._folder)
            self._learner = learner
        return self._learner

    def _release(self) -> None:
        if self._learner is not None:
            self._learner.close()
            self._learner = None

    def _write(self, folder: Path, parent: str) -> None:
        """Fills a version's folder."""
        assert self._folder is not None
        self._restored().write_model(folder)
        publish.copy_tokenizer(self._base, folder)
        (folder / SAMPLES).write_text((self._folder / SAMPLES).read_text())
        publish.write_deltas(self._shared.store.root / parent, folder)

    def _manifest(self, state: State, samples: int, ids: str, measured: dict[str, float]) -> CheckpointManifest:
        role, settings = self._objective.role, self._shared.settings
        manifest = CheckpointManifest(
            version=state.version,
            role=role,
            sequence=int(state.version.rpartition("-")[2]),
            parent=self._state.version,
            base_model=self._base.manifest.base_model,
            lineage=Lineage(
                objective=self._objective.name,
                settings=self._objective.settings() | _lineage_settings(settings, self.name),
                offsets=_ranges(self._state, state),
                sample_count=samples,
                samples_sha256=files.sha256_bytes(ids.encode()),
                reference_version=self._base.manifest.version if self._objective.needs_reference else "",
                code_version=publish.code_version(),
                steps=state.steps,
                retracted_sample_ids=self._retracted,
            ),
            metrics=measured,
        )
        manifest.created_at.GetCurrentTime()
        if role == ModelRole.MODEL_ROLE_POLICY:
            prompt, continuation = publish.probe_tokens(self._encoder.tokenizer)
            logprobs = self._restored().probe(prompt, continuation)
            manifest.probes.append(Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=logprobs))
        else:
            prompt, response = publish.scored_probe_tokens(self._encoder.tokenizer)
            score = self._restored().probe_score([*prompt, *response])
            manifest.probes.append(Probe(prompt_token_ids=prompt, token_ids=response, score=score))
        return manifest

    def _report(self, report: StepReport, on_step: Callable[[StepReport], None]) -> None:
        metrics.LOSS.labels(self.name).set(report.loss)
        for measure, value in report.measures.items():
            metrics.MEASURE.labels(self.name, measure).set(value)
        metrics.GRAD_NORM.labels(self.name).set(report.grad_norm)
        logger.info("step", extra={"task": self.name, **progress.fields(report)})
        on_step(report)

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        with tracing.span(f"trainer.{phase}", task=self.name), metrics.PHASE.labels(self.name, phase).time():
            yield


def _objective(name: TaskName, settings: TrainerSettings) -> Mixture:
    text, field = settings.objective(name), f"{name}_objective"
    for term in losses.parse(text, _role(name), field=field):
        if losses.kind(term) is not Pair:
            raise errors.InvalidArgument(
                f"is {text!r}, but what {term} learns from does not come by the stream yet.",
                field=field,
                remedy="Use one of DPO's family, or learn from a file: `python -m trainer --data FILE --objective "
                f"{term}`.",
            )
    return losses.objective(text, _role(name), settings, field=field)


def _role(name: TaskName) -> ModelRole.ValueType:
    return ModelRole.MODEL_ROLE_POLICY if name == "policy" else ModelRole.MODEL_ROLE_REWARD


def _lineage_settings(settings: TrainerSettings, task: TaskName) -> dict[str, str]:
    names: tuple[str, ...] = (
        "epochs",
        "batch_size",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    )
    names += ("max_grad_norm", "max_length", "micro_batch_tokens", "seed", "zero_stage")
    return {name: str(getattr(settings, name)) for name in names} | {
        "learning_rate": repr(settings.learning_rate(task))
    }


def _ranges(before: State, after: State) -> list[OffsetRange]:
    """What was consumed between two states. A topic that was lost in between was consumed from its beginning."""
    ranges = []
    for tp, end in sorted(after.positions.items()):
        start = before.positions.get(tp, 0)
        same = before.topic_ids.get(tp.topic) == after.topic_ids.get(tp.topic)
        ranges.append(
            OffsetRange(topic=tp.topic, partition=tp.partition, start=start if same and start <= end else 0, end=end)
        )
    return ranges
