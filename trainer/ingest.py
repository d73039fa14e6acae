"""From the `comparisons` topic to samples. What cannot be used goes to the dead letters and holds nothing up."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thumbwheel import errors, tracing
from thumbwheel.stream import deadletter, topics
from thumbwheel.stream.log import Log, Producer, Record, TopicPartition
from thumbwheel.v1.events_pb2 import ComparedResponse, ComparisonEvent, ComparisonState
from thumbwheel.v1.policy_pb2 import Role
from trainer import metrics
from trainer.buffer import Buffer
from trainer.samples import Pair

logger = logging.getLogger(__name__)

_ROLES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}


class Encoder:
    """Turns comparisons into tokens, with the tokenizer of the base model in `path`."""

    def __init__(self, path: Path, *, max_length: int, scores_text: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
        self._vocab_size = int(AutoConfig.from_pretrained(str(path)).vocab_size)
        self._max_length = max_length
        self._scores_text = scores_text
        if self.tokenizer.eos_token_id is None:
            raise errors.FailedPrecondition(
                f"{path}: the tokenizer has no end-of-text token.", remedy="Set eos_token in tokenizer_config.json."
            )

    def encode(self, event: ComparisonEvent) -> Pair:
        """The sample of an accepted comparison. Raises `errors.InvalidArgument` naming the field that is wrong."""
        prompt = self._prompt(event)
        if not math.isfinite(event.weight) or event.weight <= 0:
            raise errors.InvalidArgument(f"is {event.weight}, not a positive number.", field="weight")
        chosen, rejected = self._response(event.chosen), self._response(event.rejected)
        for field, ids in (
            ("prompt_token_ids", prompt),
            ("chosen.token_ids", chosen),
            ("rejected.token_ids", rejected),
        ):
            if (top := max(ids)) >= self._vocab_size:
                raise errors.InvalidArgument(
                    f"has {top}, but the vocabulary ends at {self._vocab_size - 1}.", field=field
                )
        if chosen == rejected:
            raise errors.InvalidArgument("is the same as chosen: there is nothing to learn.", field="rejected")
        room = self._max_length - max(len(chosen), len(rejected))
        if room < 1:
            field = "chosen" if len(chosen) >= len(rejected) else "rejected"
            raise errors.InvalidArgument(
                f"has {self._max_length - room} tokens and leaves no room for a prompt in {self._max_length}.",
                field=field,
                remedy="Raise --max-length.",
            )
        spans = (*event.chosen.spans, *event.rejected.spans)
        return Pair(
            id=event.comparison_id,
            prompt=prompt[-room:],
            chosen=chosen,
            rejected=rejected,
            weight=event.weight,
            received_at=event.received_at.ToNanoseconds() / 1e9,
            versions=tuple(sorted({span.version for span in spans})),
        )

    def _prompt(self, event: ComparisonEvent) -> tuple[int, ...]:
        """The prompt as the model saw it; one that no model of ours was asked, or that was redacted, as it would see it
        now.
        """
        if event.prompt_token_ids:
            return tuple(event.prompt_token_ids)
        match event.prompt.WhichOneof("content"):
            case "chat":
                turns = [{"role": _ROLES.get(m.role, ""), "content": m.content} for m in event.prompt.chat.messages]
                try:
                    ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
                except Exception as error:  # a template raises what it likes
                    raise errors.InvalidArgument(f"does not fit the chat template: {error}.", field="prompt") from error
            case "text":
                ids = self.tokenizer(event.prompt.text, add_special_tokens=False)["input_ids"]
            case "tokens":
                ids = event.prompt.tokens.ids
            case _:
                ids = []
        if not ids:
            raise errors.InvalidArgument("is empty.", field="prompt_token_ids")
        return tuple(int(token) for token in ids)

    def _response(self, response: ComparedResponse) -> tuple[int, ...]:
        # A scorer is asked about a text, so it learns from the text, not from how it was cut into tokens.
        if response.token_ids and not self._scores_text:
            return tuple(response.token_ids)
        ids = self.tokenizer(response.text, add_special_tokens=False)["input_ids"]
        return (*(int(token) for token in ids), int(self.tokenizer.eos_token_id))


class Ingest:
    """Reads comparisons into a buffer. Keeps its place itself; the broker is only told for its lag."""

    def __init__(
        self,
        log: Log,
        producer: Producer,
        encoder: Encoder,
        *,
        task: str,
        start: Mapping[TopicPartition, int],
        topic_ids: Mapping[str, str],
    ) -> None:
        self._name = f"trainer-{task}"
        self._task = task
        self._producer = producer
        self._encoder = encoder
        self._consumer = log.consumer([topics.COMPARISONS], group=self._name, start=start, topic_ids=topic_ids)

    def read(self, buffer: Buffer, timeout: float) -> Sequence[str]:
        """Takes in what there is, waiting up to `timeout` seconds for something. Returns the ids of samples that were
        learnt and are now retracted. Raises `errors.Unavailable` where a dead letter cannot be delivered.
        """
        retracted = []
        for record in self._consumer.poll(timeout):
            try:
                event = deadletter.decode(ComparisonEvent, record)
                if self._take(event, buffer, tracing.of_record(record.headers)):
                    retracted.append(event.comparison_id)
            except errors.InvalidArgument as error:
                self._bury(record, str(error))
        metrics.PENDING.labels(self._task).set(len(buffer))
        return retracted

    def positions(self) -> dict[TopicPartition, int]:
        """The offsets up to which `read` has taken everything in."""
        return self._consumer.positions()

    def topic_ids(self) -> dict[str, str]:
        """The topics that the positions belong to."""
        return self._consumer.topic_ids()

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Tells the broker how far this task is."""
        self._consumer.commit(positions)

    def close(self) -> None:
        """Lets go of the broker."""
        self._consumer.close()

    def _take(self, event: ComparisonEvent, buffer: Buffer, traceparent: str) -> bool:
        """Buffers or retracts. True for a sample that was learnt and is now retracted."""
        _require_id(event.comparison_id)
        if event.state == ComparisonState.COMPARISON_STATE_RETRACTED:
            metrics.RETRACTIONS.labels(self._task).inc()
            return buffer.retract(event.comparison_id, event.revision)
        if event.state != ComparisonState.COMPARISON_STATE_ACCEPTED:
            raise errors.InvalidArgument(f"is {event.state}, neither accepted nor retracted.", field="state")
        buffer.restore(event.comparison_id, event.revision)
        if buffer.reweigh(event.comparison_id, event.weight):
            return False
        if event.comparison_id in buffer:
            metrics.DUPLICATES.labels(self._task).inc()
        else:
            sample = dataclasses.replace(self._encoder.encode(event), traceparent=traceparent)
            buffer.add(sample, time.monotonic())
            if traceparent:
                tracing.record("trainer.ingest", parent=traceparent, began=time.time(), task=self._task)
        return False

    def _bury(self, record: Record, reason: str) -> None:
        asyncio.run(deadletter.bury(self._producer, record, reason=reason, consumer=self._name))


def _require_id(comparison_id: str) -> None:
    try:
        canonical = str(uuid.UUID(comparison_id))
    except ValueError:
        canonical = ""
    if not canonical or canonical != comparison_id:
        raise errors.InvalidArgument(f"{comparison_id[:64]!r} is no UUID.", field="comparison_id")
