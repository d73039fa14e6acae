"""A task: one role's model learning from the stream. The verbs of the loop, and what has to survive between them.

Everything that must survive lies in one training checkpoint: weights, optimizer, random state, what waits, what was
seen, offsets, and which version it stands for. Between rounds a task *is* its newest checkpoint; only where it is alone
in the process does its learner stay in memory.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf import json_format

from thumbwheel import errors, files, tracing
from thumbwheel.checkpoints.store import SAMPLES, VerifiedVersion, version_name
from thumbwheel.stream.log import TopicPartition
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole
from trainer import feed, guards, lineage, losses, metrics, publish
from trainer.background import Background
from trainer.buffer import Buffer
from trainer.checkpoint import TrainingCheckpoints
from trainer.config import TaskName, TrainerSettings
from trainer.feed import Feed
from trainer.ingest import Encoder, Ingest
from trainer.losses.base import PerSample
from trainer.publish import MODEL, Publisher
from trainer.reward.watch import RewardWatch
from trainer.samples import Kind, Sample, Tokens
from trainer.shared import Shared
from trainer.staleness import sequence as version_number
from trainer.state import Outlook, State, begin, published_as
from trainer.watch import Watch

if TYPE_CHECKING:
    from trainer.learner import StepReport
    from trainer.losses.mixture import Mixture

logger = logging.getLogger(__name__)

STATE = "state.json"
VERSION = "version.json"
LESSON = "lesson.json"
_ANNOUNCE_SECONDS = 3.0
"""How long the rest of a checkpoint waits for a version to be announced. After it, that goes on."""
_GRACE_SECONDS = 3.0
"""How long after a model's weights the optimizer's, of six times their size, are written, where no other round begins
meanwhile: what servers on the same machine do with the version comes first.
"""


class _Making(NamedTuple):
    """A checkpoint that is not finished."""

    staging: Path
    model_saved: Future[None]
    finish: Callable[[], None]


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
        self._referenced: PerSample = {}
        self._began = 0.0
        self._after = Background(f"after-{name}", nicer=0)  # people wait for it
        self._making: _Making | None = None
        self._to_commit: dict[TopicPartition, int] = {}
        self._folder = self._checkpoints.newest()
        self._state, self._buffer = self._load(self._folder) if self._folder else self._begin()
        # Where a round was being learnt, what it learns is taken from there, and not read from the stream again.
        self._begun = self._checkpoints.round(self._state.round + 1)
        self._planned: list[str] = []
        self._published = ""
        """The version that the round in `_begun` was published as, where it was before it came to a checkpoint."""
        self._held: list[Sample] = []
        """What that version learnt from, until it is learnt again."""
        start = self._state
        if self._begun is not None:
            start, self._buffer = self._load(self._begun)
            lesson = json.loads((self._begun / LESSON).read_text())
            self._planned, self._retracted = lesson["samples"], lesson["retracted"]
            self._hold_published()
        self._halted = ""
        self._watch = Watch(name, settings)
        self._reward_watch = RewardWatch.load(self._begun or self._folder)
        self._kinds: frozenset[Kind] = frozenset(term.objective.kind for term in self._objective.terms)
        self._feed = self._open_feed()
        online = name == "policy" and feed.wants_rollouts(self._kinds, settings)
        self._ingest = Ingest(
            shared.log,
            shared.producer,
            self._encoder,
            task=name,
            start=start.positions,
            topic_ids=start.topic_ids,
            kinds=feed.wanted_kinds(self._kinds, settings) if name == "policy" else self._kinds,
            prompts=self._feed.prompts if online else None,
            prompt_room=settings.rollout_tokens,
            unjudged_prompts=settings.unjudged_prompts,
            voting=self._feed.voting,
            learns_from=self._objective.learns_from,
            on_retraction=self._feed.replay.retract,
        )

    def resume(self) -> None:
        """Announces the version that this task goes on from; publishes it first, where a crash came in between."""
        logger.info("resumed", extra={"task": self.name, "version": self._state.version, "round": self._state.round})
        if self.name == "policy":
            self._feed.open()
        if self._folder is not None:
            self.publish()
            self._after.wait()
        else:
            self._publisher.announce(self._shared.store.load(self._state.version))

    def ingest(self, timeout: float) -> None:
        """Takes in feedback from the stream, waiting up to `timeout` seconds for the first, and rollouts."""
        self._after.check()
        self._commit_published()
        self._shared.team.idle()
        if self._held:  # before anything else is read
            return
        self._retracted += self._ingest.read(self._buffer, timeout)
        self._feed.collect(self._buffer, time.monotonic())
        self._feed.ask(self._buffer)
        self._watch.lag(self._ingest.lag)

    @property
    def waiting(self) -> int:
        """Samples that wait to be learnt."""
        return len(self._buffer)

    def outlook(self, timeout: float) -> Outlook:
        """What it would go on with, having read all that is on the stream; nothing is published, and nobody is asked.

        Raises `errors.DeadlineExceeded` where reading takes longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while lag := sum(self._ingest.lag().values()):
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"{lag} records are not read after {timeout:g} s.")
            self._retracted += self._ingest.read(self._buffer, 1.0)
        return Outlook(
            task=self.name,
            objective=self._objective.name,
            base=self._base.manifest.version,
            version=self._state.version,
            round=self._state.round,
            steps=self._state.steps,
            checkpoint=self._folder,
            waiting=self._buffer.oldest(len(self._buffer)),
            due=self.due(),
            prompts=len(self._feed.prompts),
            replayable=len(self._feed.replay),
            demonstrations=len(self._feed.demonstrations),
            retracted=tuple(self._retracted),
        )

    def due(self) -> bool:
        """True where a round is to start. Rollouts that are too old by now are dropped."""
        if self._held:
            return not self._halted
        # What was taken back since is not learnt, also of a round that was begun.
        self._planned = [sample.id for sample in self._buffer.pick(self._planned)]
        if self._planned:
            return not self._halted
        settings = self._shared.settings
        self._feed.drop_stale(self._buffer, version_number(self._state.version))
        return not self._halted and self._buffer.due(
            time.monotonic(),
            round_size=settings.round_size,
            min_round_size=settings.min_round_size,
            max_wait=settings.max_wait_seconds,
        )

    def batch(self) -> list[Sample]:
        """The samples of the next round, oldest first; they go on waiting until a checkpoint has them. Which they are
        is written down before they are learnt; of a round that was begun before, once more: more may have been read
        since, or taken back, and the version that comes of it is known again by that. Raises `errors.NoSpace`.
        """
        if self._held:
            self._planned, held, self._held = [], self._held, []
            return held
        found = self._buffer.pick(self._planned) or self._buffer.oldest(self._shared.settings.round_size)
        self._planned = []
        lesson = {"samples": [sample.id for sample in found], "retracted": self._retracted}
        state = dataclasses.replace(self._state, positions=self._ingest.positions(), topic_ids=self._ingest.topic_ids())

        def fill(folder: Path) -> None:
            self._save(folder, state)
            (folder / LESSON).write_text(json.dumps(lesson))

        self._checkpoints.write_round(self._state.round + 1, fill)
        return found

    def halt(self, fault: guards.Unfit) -> None:
        """Learns and publishes no more until the process is started again; says why. What waits, waits."""
        self._halted = fault.reason
        metrics.HALTED.labels(self.name, fault.reason).set(1)
        logger.critical("%s", fault, extra={"task": self.name, "reason": fault.reason})
        self._release()

    def learn(self, samples: Sequence[Sample], on_step: Callable[[StepReport], None]) -> dict[str, float]:
        """Learns from a round; returns its measurements. Raises `Stopped`, and `guards.Unfit` where what came of it is
        not to be published.
        """
        team = self._shared.team
        self._began = time.time()

        def step_done(report: StepReport) -> None:
            self._watch.step(report, team.learner.steps_done)
            on_step(report)

        logger.info("round begins", extra={"task": self.name, "round": self._state.round + 1, "samples": len(samples)})
        self._feed.ask(self._buffer, ahead=len(samples))  # the next round's rollouts are made meanwhile
        written, samples = samples, self._feed.lesson(samples, round_number=self._state.round + 1)
        if self._objective.needs_reference:
            with metrics.phase(self.name, "reference"):
                self._referenced = self._refer(samples)
        with metrics.phase(self.name, "restore"):
            self._restore()
        if self.name == "reward":
            with metrics.phase(self.name, "judge"):  # before they are learnt
                self._reward_watch.see(team.judge(written))
        with metrics.phase(self.name, "learn"):
            measured = team.learn(
                samples,
                round_number=self._state.round + 1,
                on_step=step_done,
            )
        if self.name == "reward":
            measured |= metrics.watch(self._reward_watch)
        self._watch.round(self._state.round + 1, self._state.version, written, samples, measured, self._state.vitals)
        return measured

    def checkpoint(self, samples: Sequence[Sample], measured: dict[str, float]) -> None:
        """Makes what was learnt durable, together with everything it depends on: from then on it is never learnt again.

        Most of it is written in the background, when `publish` has published what came of it. Raises `errors.NoSpace`,
        and what kept the round before from being written or published.
        """
        self._after.wait()
        self._buffer.learnt(sample.id for sample in samples)
        self._feed.replay.learnt(samples, self._referenced)
        self._referenced = {}
        newest = self._shared.store.latest(self._objective.role)
        state = State(
            round=self._state.round + 1,
            steps=self._shared.team.learner.steps_done,
            # Above what is in the store even where an older training checkpoint had to be used: names are used once.
            version=self._published or version_name(self._objective.role, (newest.sequence if newest else 0) + 1),
            positions=self._ingest.positions(),
            topic_ids=self._ingest.topic_ids(),
            vitals={**self._watch.vitals, **self._state.vitals},
            start=self._state.start,
        )
        with metrics.phase(self.name, "checkpoint"):
            staging = self._checkpoints.stage(state.round, lambda folder: self._save(folder, state))
            grace = _GRACE_SECONDS if self._resident else 0.0
            writing = self._shared.team.save(staging, staging / MODEL, grace)
        ids = "".join(f"{sample_id}\n" for sample_id in sorted(sample.id for sample in samples))
        manifest = lineage.manifest(  # while the weights are being written
            self._objective,
            self._shared.settings,
            self.name,
            before=self._state,
            after=state,
            samples=samples,
            samples_sha256=files.sha256_bytes(ids.encode()),
            retracted=self._retracted,
            base=self._base.manifest,
            measured=measured,
            probe=lineage.probe(self._shared.team, self._encoder.tokenizer, self._objective.role),
        )

        def fill(folder: Path) -> None:
            (folder / VERSION).write_text(json_format.MessageToJson(manifest))
            (folder / SAMPLES).write_text(ids)

        self._checkpoints.add(state.round, staging, fill)

        def finish() -> None:
            with metrics.phase(self.name, "write"):
                self._checkpoints.finish(state.round, staging, writing.wait)

        self._making = _Making(staging, self._shared.team.learner.saver.model_saved, finish)
        self._folder = self._checkpoints.target(state.round)
        self._state, self._retracted, self._learnt, self._published = state, [], samples, ""
        metrics.ROUNDS.labels(self.name).inc()
        metrics.LEARNT.labels(self.name).inc(len(samples))
        metrics.PENDING.labels(self.name).set(len(self._buffer))

    def publish(self) -> None:
        """Publishes the version that the newest training checkpoint stands for, and announces it. May be done again.

        People wait for it, and nobody for the rest of the checkpoint: that is finished afterwards. Should it never be,
        the round is learnt again, as it was written down, and comes to the version that is there.
        """
        assert self._folder is not None, "there is nothing to publish before the first checkpoint"
        learnt, began, making = self._learnt, self._began, self._making
        self._learnt, self._making = (), None
        if making is None:
            folder = self._folder
            self._do_after(lambda: self._publish(folder, learnt, began))
            return

        def release() -> None:
            making.model_saved.result()
            self._publish(making.staging, learnt, began, making.finish)

        self._do_after(release)
        if not self._resident:
            self._release()

    def _hold_published(self) -> None:
        """A round that was begun may have been published, though it did not come to a checkpoint. Then it is learnt
        again, from the very same samples, before anything else is read: what was taken back since is told of the next.
        """
        self._published = published_as(self._shared.store, self._objective.role, self._state, self._planned)
        if self._published:
            logger.info(
                "published before it was in a checkpoint", extra={"task": self.name, "version": self._published}
            )
            self._held = self._buffer.pick(self._planned)
            self._buffer.learnt(self._planned)

    def _publish(
        self, made: Path, learnt: Sequence[Sample], began: float, finish: Callable[[], None] = lambda: None
    ) -> None:
        manifest = json_format.Parse((made / VERSION).read_text(), CheckpointManifest())
        received = [sample.received_at for sample in learnt]
        with metrics.phase(self.name, "publish"):
            store, parent = self._shared.store, manifest.parent
            version = self._publisher.publish(
                manifest,
                lambda folder: publish.write_version(made, folder, base=self._base, store=store, parent=parent),
            )
            announced = self._publisher.announce(version, received, patience=_ANNOUNCE_SECONDS)
            within = tracing.traceparent()
        if announced:
            self._publisher.told(manifest.version, learnt, began=began, within=within)
        finish()
        if not announced and self._publisher.announce(version, received):
            self._publisher.told(manifest.version, learnt, began=began, within=within)
        if self._shared.settings.keep_versions:
            self._publisher.thin(self._objective.role, self._shared.settings.keep_versions, also=[self._state.start])

    def commit(self) -> None:
        """Has the broker told how far this task is, when that is published: for monitoring lag. Nothing ever starts
        from it.
        """
        self._to_commit = self._state.positions
        self._commit_published()

    def close(self) -> None:
        """Lets go of everything, when what was begun in the background is done."""
        self._shared.team.hurry()
        try:
            self._after.close()
        finally:
            self._feed.close()
            self._watch.close()
            self._release()
            self._ingest.close()

    def _commit_published(self) -> None:
        if self._to_commit and self._after.idle:
            self._ingest.commit(self._to_commit)
            self._to_commit = {}

    def _save(self, folder: Path, state: State) -> None:
        """Writes what a task is, but for its learner."""
        self._buffer.save(folder)
        self._feed.save(folder)
        self._reward_watch.save(folder)
        (folder / STATE).write_text(state.to_json())

    def _do_after(self, work: Callable[[], None]) -> None:
        """Does work in the background, after all such work before; where tasks take turns, now. It is of this round's
        trace.
        """
        self._after.submit(functools.partial(contextvars.copy_context().run, work))
        if not self._resident:
            self._after.wait()

    def _open_feed(self) -> Feed:
        """What a policy is fed with beside people's judgements."""
        online = self.name == "policy" and feed.wants_rollouts(self._kinds, self._shared.settings)
        return feed.resume(
            self._shared.settings,
            self.name,
            self._kinds,
            folder=self._begun or self._folder,
            encoder=self._encoder,
            refer=self._reference_texts if online and self._objective.wants_baseline else None,
        )

    def _refer(self, wanted: Sequence[Sample]) -> PerSample:
        """Has the reference's log-probabilities worked out for the team; returns those to keep with the samples."""
        referenced = self._objective.referenced(wanted)
        known = self._feed.replay.reference(sample.id for sample in referenced)
        new = [sample for sample in referenced if sample.id not in known]
        found = self._shared.team.reference(self._base.path, new, {id: of.tolist() for id, of in known.items()})
        return found if self._shared.settings.replay_ratio else {}

    def _reference_texts(self, prompts: Sequence[Tokens]) -> Mapping[Tokens, str]:
        from trainer import sampling

        with metrics.phase(self.name, "baseline"):
            return sampling.reference_texts(
                self._base.path,
                self._encoder.tokenizer,
                prompts,
                max_tokens=self._shared.settings.rollout_tokens,
                seed=self._shared.settings.seed + self._state.round,
            )

    def _load_base(self) -> VerifiedVersion:
        version = version_name(self._objective.role, 0)
        try:
            return self._shared.store.load(version)
        except errors.NotFound as error:
            raise errors.MissingModel(
                f"There is no {version} in {self._shared.store.root} to begin from.",
                remedy="Type `python -m trainer --init-only` first.",
            ) from error

    @property
    def _learnt_home(self) -> Path:
        return self._shared.settings.training_path / self.name / ".learnt"

    def _load(self, folder: Path) -> tuple[State, Buffer]:
        return State.from_json((folder / STATE).read_text()), Buffer.load(folder, time.monotonic(), self._learnt_home)

    def _begin(self) -> tuple[State, Buffer]:
        """The state where there is no training checkpoint: that of the newest version, with a fresh optimizer; or what
        the first round began from, where that was written down, and may have been published.
        """
        if (first := self._checkpoints.round(1)) is not None:
            state, buffer = self._load(first)
            return dataclasses.replace(state, positions={}, topic_ids={}), buffer
        state, learnt = begin(self._shared.store, self._objective.role)
        if state.version != self._base.manifest.version:
            logger.warning(
                "no training checkpoint: beginning from the newest version, with a fresh optimizer",
                extra={"task": self.name, "version": state.version},
            )
        buffer = Buffer(self._learnt_home)
        buffer.learnt(learnt)
        return state, buffer

    def _restore(self) -> None:
        """Makes the learner from the newest training checkpoint where it is not in memory."""
        if not self._shared.team.is_open:
            start = self._shared.store.load(self._state.start or self._base.manifest.version).path
            steps = self._state.steps
            self._shared.team.open(self.name, start, steps_done=steps, checkpoint=self._folder)

    def _release(self) -> None:
        self._shared.team.close()


def _objective(name: TaskName, settings: TrainerSettings) -> Mixture:
    return losses.objective(settings.objective(name), _role(name), settings, field=f"{name}_objective")


def _role(name: TaskName) -> ModelRole.ValueType:
    return ModelRole.MODEL_ROLE_POLICY if name == "policy" else ModelRole.MODEL_ROLE_REWARD
