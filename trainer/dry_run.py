"""`thumbwheel train --dry-run`: what would be trained from what. The stream is read, and nothing else happens."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.stream import open_log
from thumbwheel.stream.log import Headers, Log, Outcome, Outgoing, Position
from trainer import losses, runtime
from trainer.config import TrainerSettings
from trainer.feed import wants_rollouts
from trainer.samples import KINDS, Group, Sample, kind_name
from trainer.shared import Shared
from trainer.state import Outlook
from trainer.task import Task

_SENTENCES = {
    "pair": "comparisons",
    "thumb": "thumbs",
    "demonstration": "demonstrations",
    "group": "groups of rollouts",
}


class Silent:
    """A producer that sends nothing and counts what it was given: the records that would be dead letters."""

    def __init__(self) -> None:
        self.count = 0

    def send(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> Future[Position]:
        """Resolves at once."""
        self.count += 1
        done: Future[Position] = Future()
        done.set_result(Position(topic, 0, self.count))
        return done

    def send_all(self, records: Sequence[Outgoing]) -> Future[list[Outcome]]:
        """Resolves at once."""
        done: Future[list[Outcome]] = Future()
        done.set_result([self.send(*record).result() for record in records])
        return done

    def flush(self, timeout: float) -> None:
        """There is nothing to wait for."""

    def close(self, timeout: float) -> None:
        """There is nothing to stop."""


def run(settings: TrainerSettings, store: LocalStore, stop: threading.Event) -> None:
    """Prints the plan of every task. Raises what keeps a trainer from starting."""
    runtime.quiet_transformers()
    log = open_log(settings.bootstrap_servers)
    try:
        for about, text in plan(settings, store, log, stop):
            print(f"{about:<14}{text}", flush=True)
    finally:
        log.close()
    print("Nothing was learnt: this was a dry run.")


def plan(settings: TrainerSettings, store: LocalStore, log: Log, stop: threading.Event) -> Iterator[tuple[str, str]]:
    """What would be trained from what: what each line is about, and what is to be said about it."""
    signer = ManifestSigner.load(settings.keys_path)
    for name in settings.tasks:
        silent = Silent()
        task = Task(name, Shared(settings, log, silent, store, signer, stop), resident=False)
        try:
            yield from _lines(task.outlook(settings.start_timeout_seconds), settings, silent.count)
        finally:
            task.close()


def _lines(found: Outlook, settings: TrainerSettings, unusable: int) -> Iterator[tuple[str, str]]:
    yield "task", found.task
    kinds = set()
    for name, weight in losses.parse(found.objective, losses.role_of(found.objective), field="objective").items():
        kind = losses.kind(name)
        kinds.add(kind)
        yield "  objective", f"{name}, weight {weight:g}: learns from {_SENTENCES[kind_name(kind)]}"
    place = f"training checkpoint {found.checkpoint}" if found.checkpoint else "no training checkpoint"
    yield "  goes on from", f"{found.version} after {found.round} rounds and {found.steps} steps ({place})"
    yield "  reference", found.base
    yield "  waiting", _counts(found.waiting) or "nothing"
    if found.retracted:
        yield "  retracted", f"{len(found.retracted)} of what was learnt; the next version's lineage will list them"
    if unusable:
        yield "  not usable", f"{unusable} records on the stream, which would become dead letters"
    if found.task == "policy" and wants_rollouts(kinds, settings):
        yield (
            "  rollouts",
            f"{settings.rollout_responses} of up to {settings.rollout_tokens} tokens to each of {found.prompts} "
            f"prompts by the policy at {settings.policy}, scored by {settings.reward}",
        )
    if settings.replay_ratio and found.task == "policy":
        yield "  replay", f"{settings.replay_ratio:g} for each new sample, of {found.replayable} that were learnt"
    if found.demonstrations:
        ratio = settings.demonstrations_ratio
        yield "  besides", f"{ratio:g} demonstrations for each, of {found.demonstrations} in {settings.demonstrations}"
    size = min(len(found.waiting), settings.round_size)
    if found.due:
        steps = math.ceil(size / settings.batch_size) * settings.epochs
        rate = settings.learning_rate(found.task)
        yield "  next round", f"at once: {size} samples in {steps} steps at learning rate {rate:g}"
    else:
        least = min(settings.round_size, settings.min_round_size)
        yield (
            "  next round",
            f"when {settings.round_size} samples wait, or {least} have waited {settings.max_wait_seconds:g} s",
        )


def _counts(samples: Sequence[Sample]) -> str:
    found = {name: sum(isinstance(sample, kind) for sample in samples) for name, kind in KINDS.items()}
    responses = sum(len(sample.rollouts) for sample in samples if isinstance(sample, Group))
    text = ", ".join(f"{count} {_SENTENCES[name]}" for name, count in found.items() if count)
    return text + (f" ({responses} responses)" if responses else "")
