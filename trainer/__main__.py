"""`python -m trainer`, or `torchrun -m trainer`: the trainer. With `--data FILE` it learns from a file and ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thumbwheel import errors, telemetry
from trainer import runtime
from trainer.config import LearningSettings, OfflineSettings, TrainerSettings

if TYPE_CHECKING:
    from thumbwheel.auth import ManifestSigner
    from thumbwheel.checkpoints.store import LocalStore
    from thumbwheel.stream.log import Producer

_CLOSE_SECONDS = 5.0

logger = logging.getLogger("trainer")


def main(settings: TrainerSettings, stop: threading.Event) -> None:
    """Publishes version 0 where asked to; then learns until `stop`."""
    if not settings.init_only and not runtime.is_lead():
        _follow(settings, stop)
        return
    from thumbwheel.auth import ManifestSigner, ManifestVerifier
    from thumbwheel.checkpoints.store import LocalStore

    store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
    if settings.dry_run:
        from trainer import dry_run

        dry_run.run(settings, store, stop)
        return
    signer = ManifestSigner.load(settings.keys_path)
    if settings.init_only or settings.base_model:
        _ensure_base(settings, store, signer)
    if settings.init_only:
        return

    from thumbwheel.serving import health_server
    from thumbwheel.stream import open_log, topics

    with (
        health_server(process="trainer", listen=settings.listen, metrics_port=settings.metrics_port) as ready,
        contextlib.closing(open_log(settings.bootstrap_servers, settings.kafka_tls)) as log,
    ):
        runtime.prepare(settings.threads)
        from trainer import loop
        from trainer.shared import Shared
        from trainer.task import Task

        wanted = topics.topics(partitions=settings.topic_partitions, replication=settings.topic_replication)
        log.ensure_topics([topic for topic in wanted if not topic.republished], settings.start_timeout_seconds)
        with contextlib.ExitStack() as opened:
            producer = log.producer()
            opened.callback(_close, producer)
            shared = Shared(settings, log, producer, store, signer, stop)
            opened.callback(shared.team.end)
            tasks = []
            for name in settings.tasks:
                tasks.append(Task(name, shared, resident=len(settings.tasks) == 1))
                opened.callback(tasks[-1].close)
            loop.run(tasks, stop, ready)


def _follow(settings: TrainerSettings, stop: threading.Event) -> None:
    """What ranks but the first do: their part of the learner's work. Only rank 0 reads the stream and publishes."""
    runtime.prepare(settings.threads)
    from trainer.team import Team

    with contextlib.suppress(runtime.Stopped):
        Team(settings, stop.is_set).follow()


def _close(producer: Producer) -> None:
    try:
        producer.close(_CLOSE_SECONDS)
    except (errors.DeadlineExceeded, errors.Unavailable) as error:
        # Only an announcement can be on its way, and the newest version is announced at every start.
        logger.warning("not everything was delivered: %s", error)


def _ensure_base(settings: TrainerSettings, store: LocalStore, signer: ManifestSigner) -> None:
    from thumbwheel.heads import Heads
    from trainer import base, publish

    runtime.quiet_transformers()
    heads = Heads(settings.reward_aspects, settings.ensemble_heads)
    publish.ensure_base(base.fetch(settings.base_model or None, progress=sys.stderr.isatty()), store, signer, heads)


def _from_file(arguments: Sequence[str]) -> bool:
    """Whether `--data FILE` is among them."""
    return any(argument.partition("=")[0] == "--data" for argument in arguments)


def _run(stop: threading.Event) -> None:
    parsed: LearningSettings
    if _from_file(sys.argv[1:]):
        parsed = OfflineSettings.from_command_line(prog="python -m trainer")
        telemetry.setup_logging("trainer", parsed.log_level)
        runtime.before_imports()
        from trainer import offline

        try:
            offline.run(parsed, stop.is_set)
        except runtime.Stopped:
            raise SystemExit("Stopped: nothing was written.") from None
        except errors.ThumbwheelError as error:
            raise SystemExit(f"python -m trainer: {error}") from None
    else:
        parsed = TrainerSettings.from_command_line(prog="python -m trainer")
        telemetry.start("trainer", parsed)
        runtime.before_imports(beside_servers=True)
        main(parsed, stop)


if __name__ == "__main__":
    asked_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.set())
    try:
        _run(asked_to_stop)
    except errors.ThumbwheelError as error:
        logger.critical("%s", error)
        raise SystemExit(1) from None
