"""Versions leave the trainer: into the store first, then announced on the `versions` topic."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from uuid_utils import uuid7

from thumbwheel import errors, files, tracing
from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints import delta
from thumbwheel.checkpoints.store import SAMPLES, LocalStore, VerifiedVersion, Write, version_name
from thumbwheel.heads import ONE_HEAD, Heads
from thumbwheel.stream import topics
from thumbwheel.stream.log import Position, Producer
from thumbwheel.v1.events_pb2 import VersionEvent
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, Lineage, ModelRole, Probe, VersionState
from trainer import metrics
from trainer.samples import Sample

logger = logging.getLogger(__name__)

MODEL = "model"
"""The folder of what is published, in a training checkpoint."""

PROBE_PROMPT = "Question: What is the capital of France?\nAnswer:"
PROBE_CONTINUATION = " The capital of France is Paris."

MOST_TIMES = 256
"""Samples of a version whose times an announcement tells."""

MOST_CHANGED = 0.5
"""Share of the weights above which no delta is written."""

HEAD_STD = 0.02
"""Standard deviation of the weights from which members of a reward model's ensemble begin."""

_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 4.0
_ACK_SECONDS = 60.0
_STOP_SECONDS = 0.2


class Publisher:
    """Puts versions into the store and announces them. `stop` ends every wait."""

    def __init__(
        self, store: LocalStore, signer: ManifestSigner, producer: Producer, stop: threading.Event, *, task: str
    ) -> None:
        self._store, self._signer, self._producer, self._stop, self._task = store, signer, producer, stop, task

    def publish(self, manifest: CheckpointManifest, write: Write) -> VerifiedVersion:
        """1. Into the store; one that is there already is verified. Errors as `LocalStore.publish`."""
        version = self._store.publish(manifest, write, self._signer)
        if (found := version.manifest.lineage.samples_sha256) != manifest.lineage.samples_sha256:
            raise errors.Conflict(
                f"{manifest.version} is in the store already, with other samples ({found[:12]}…).",
                remedy="Two trainers write to one store, or an old training checkpoint was put back: move the newer "
                "versions away, or the training checkpoint.",
            )
        return version

    def announce(self, version: VerifiedVersion, learnt: Sequence[float] = (), *, patience: float = math.inf) -> bool:
        """2. Says on the stream that the version is there, and waits until the broker has it. While the broker is away
        it tries again, with a warning each time. False where that took longer than `patience` seconds, and where the
        process was asked to stop meanwhile: that version is announced again at the next start. `learnt` says when each
        of its samples was committed, in seconds since the epoch; 0 where that is not known.
        """
        event = version_event(version)
        known = [at for at in learnt if at]
        for at in known[:: math.ceil(len(known) / MOST_TIMES) or 1]:
            event.learnt_received_at.add().FromMicroseconds(round(at * 1e6))
        schema = event.DESCRIPTOR.full_name.encode()
        headers = (("schema", schema), ("event_id", event.event_id.encode()), *tracing.headers())
        delay, began = _FIRST_RETRY_SECONDS, time.monotonic()
        while not self._stop.is_set() and (left := patience - (time.monotonic() - began)) > 0:
            try:
                future = self._producer.send(
                    topics.VERSIONS, event.version.encode(), event.SerializeToString(), headers
                )
                if self._acknowledged(future, min(left, _ACK_SECONDS)):
                    metrics.PUBLISHED.labels(self._task).set(event.sequence)
                    logger.info("version announced", extra={"version": event.version})
                    return True
                continue
            except (errors.Unavailable, errors.ResourceExhausted, errors.DeadlineExceeded) as error:
                metrics.ANNOUNCE_RETRIES.labels(self._task).inc()
                logger.warning(
                    "version not announced yet: %s",
                    error,
                    extra={"version": event.version, "waited_seconds": round(time.monotonic() - began, 1)},
                )
            self._stop.wait(min(delay, max(0.0, patience - (time.monotonic() - began))))
            delay = min(delay * 2, _LAST_RETRY_SECONDS)
        return False

    def thin(self, role: ModelRole.ValueType, keep: int, *, also: Collection[str]) -> None:
        """Removes the weights of all but the newest `keep` versions, and those in `also`, from the store."""
        try:
            if thinned := self._store.thin(role, keep=keep, also=also):
                logger.info("weights of old versions removed", extra={"task": self._task, "versions": thinned})
        except OSError as error:
            logger.warning("weights of old versions are not removed: %s", error, extra={"task": self._task})

    def told(self, version: str, learnt: Sequence[Sample], *, began: float, within: str) -> None:
        """Notes of each sample how long it took to be learnt and announced, by a round that began at `began`, in
        seconds since the epoch. The trace of its click ends with the version that learnt from it, and leads on to the
        version's own, of which `within` is the traceparent.
        """
        for sample in learnt:
            if sample.received_at:
                metrics.FEEDBACK_TO_PUBLISH.labels(self._task).observe(max(0.0, time.time() - sample.received_at))
            tracing.record(
                "trainer.learnt",
                parent=sample.traceparent,
                began=began,
                links=[within],
                task=self._task,
                version=version,
            )

    def _acknowledged(self, future: Future[Position], seconds: float) -> bool:
        """Waits for the broker; False where the process is asked to stop. Raises what the future failed with, and
        `errors.DeadlineExceeded`.
        """
        deadline = time.monotonic() + seconds
        while not self._stop.is_set():
            if wait_for([future], timeout=_STOP_SECONDS).done:
                future.result()
                return True
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"The broker did not acknowledge the record within {seconds:.0f} s.")
        return False


def version_event(version: VerifiedVersion) -> VersionEvent:
    """The announcement of a version."""
    manifest = version.manifest
    event = VersionEvent(
        event_id=str(uuid7()),
        version=manifest.version,
        role=manifest.role,
        # Until there is a gate between the trainer and the servers, what is published is what is to be served.
        state=VersionState.VERSION_STATE_STABLE,
        sequence=manifest.sequence,
        manifest_sha256=version.manifest_sha256,
    )
    event.at.GetCurrentTime()
    return event


def code_version() -> str:
    """The version of this code, for lineages."""
    return package_version("thumbwheel")


def probe_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the fixed prompt and continuation whose log-probabilities every policy version records."""
    prompt, continuation = (
        [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in (PROBE_PROMPT, PROBE_CONTINUATION)
    )
    return prompt, continuation


def scored_probe_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The same text as a reward model reads it: up to the end-of-text token, at which every version's score is."""
    prompt, continuation = probe_tokens(tokenizer)
    return prompt, [*continuation, int(tokenizer.eos_token_id)]


def write_deltas(store: LocalStore, parent: str, folder: Path) -> dict[str, str]:
    """Writes, beside the weights in `folder`, how they are made out of those of the version `parent` of the `store`.
    Returns the weights' SHA-256, by file: they are hashed, and forced to the disk, meanwhile.

    Servers that hold the parent then read the delta alone. Where more than half of the weights have changed, or the
    parent is not in the store any more, there is nothing to be gained, and nothing is written.
    """
    before = _sha256s(store, parent)
    weights = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(1, "hashing") as beside:
        hashing = {path.name: beside.submit(_settle, path) for path in weights}

        def sha256s(name: str) -> tuple[str, str]:
            return before[name], hashing[name].result()

        for path in weights:
            old = store.root / parent / path.name
            if path.name not in before or not old.is_file():
                logger.info("no delta is written: the parent is not there", extra={"file": path.name, "parent": parent})
            elif delta.changed_share(old, path) > MOST_CHANGED:
                logger.info("no delta is written: too much has changed", extra={"file": path.name})
            else:
                made = path.with_name(path.name + delta.SUFFIX)
                delta.write(old, path, made, sha256s=functools.partial(sha256s, path.name))
    return {name: digest.result() for name, digest in hashing.items()}


def _settle(file: Path) -> str:
    """Its SHA-256; it is on the disk afterwards."""
    digest = files.sha256(file)
    files.sync(file)
    return digest


def _sha256s(store: LocalStore, version: str) -> dict[str, str]:
    """What the manifest of a version says of its files; nothing where there is none that holds."""
    if not version:
        return {}
    try:
        manifest, _, _ = store.describe(version)
    except (errors.NotFound, errors.CorruptCheckpoint) as error:
        logger.warning("the parent cannot be read: %s", error, extra={"version": version})
        return {}
    return {file.path: file.sha256 for file in manifest.files}


def write_version(made: Path, folder: Path, *, base: VerifiedVersion, store: LocalStore, parent: str) -> dict[str, str]:
    """Fills a version's folder from the training checkpoint in `made`: the model without a copy, what is beside the
    weights of the `base`, the samples' ids, and deltas to the version `parent`. Returns what `write_deltas` does.
    """
    for file in sorted(path for path in (made / MODEL).rglob("*") if path.is_file()):
        target = folder / file.relative_to(made / MODEL)
        target.parent.mkdir(exist_ok=True)
        files.link(file, target)
    copy_tokenizer(base, folder)
    shutil.copyfile(made / SAMPLES, folder / SAMPLES)
    return write_deltas(store, parent, folder)


def copy_tokenizer(source: VerifiedVersion, folder: Path) -> None:
    """Copies what surrounds the weights of a version: its tokenizer, chat template and generation settings."""
    for file in source.manifest.files:
        target = folder / file.path
        if file.path != SAMPLES and ".safetensors" not in file.path and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file.path, target)


def ensure_base(base_model: Path, store: LocalStore, signer: ManifestSigner, heads: Heads = ONE_HEAD) -> list[str]:
    """Publishes version 0 of both roles from the model in `base_model`, where the store has none; returns those made.

    The policy is the base model as it is. The reward model is its body with scoring heads of zeros, which have no
    opinion. Raises `errors.MissingModel`, and what `LocalStore.publish` raises.
    """
    made = []
    writers: dict[ModelRole.ValueType, Callable[[Path, Path], None]] = {
        ModelRole.MODEL_ROLE_POLICY: _write_policy,
        ModelRole.MODEL_ROLE_REWARD: functools.partial(write_scorer, heads=heads),
    }
    for role, write in writers.items():
        version = version_name(role, 0)
        if (store.root / version).exists():
            continue
        if not (base_model / "config.json").is_file():
            raise errors.MissingModel(
                f"There is no model in {base_model}.", remedy="Type `thumbwheel model fetch` and name what it prints."
            )
        manifest = CheckpointManifest(version=version, role=role, sequence=0, base_model=base_model.name)
        manifest.lineage.CopyFrom(Lineage(code_version=code_version()))
        manifest.probes.append(_base_probe(base_model, role))
        store.publish(manifest, functools.partial(write, base_model), signer)
        logger.info("base version published", extra={"version": version})
        made.append(version)
    return made


def _base_probe(base_model: Path, role: ModelRole.ValueType) -> Probe:
    from transformers import AutoTokenizer

    from trainer import models

    tokenizer = AutoTokenizer.from_pretrained(str(base_model))
    if role == ModelRole.MODEL_ROLE_REWARD:
        prompt, response = scored_probe_tokens(tokenizer)
        return Probe(prompt_token_ids=prompt, token_ids=response, score=0.0)  # its head is made of zeros
    prompt, continuation = probe_tokens(tokenizer)
    logprobs = models.continuation_logprobs(models.load_causal(base_model).eval(), prompt, continuation)
    return Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=logprobs)


def _write_policy(base_model: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(str(base_model), dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(base_model)).save_pretrained(folder)


def write_scorer(base_model: Path, folder: Path, heads: Heads = ONE_HEAD) -> None:
    """Writes the body of the model in `base_model` under new heads, with its tokenizer, into `folder`.

    They are zero, so that they have no opinion, but for the ensemble, whose members begin from different ones.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base_model))
    model = AutoModelForSequenceClassification.from_pretrained(
        str(base_model), num_labels=len(heads.names), id2label=dict(enumerate(heads.names)), dtype="auto"
    )
    model.score.weight.data.zero_()
    members = model.score.weight.data[heads.judging :]
    members.copy_(HEAD_STD * torch.randn(members.shape, generator=torch.Generator().manual_seed(0)))
    if model.config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
