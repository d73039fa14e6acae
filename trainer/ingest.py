"""From the stream to samples and prompts. What cannot be used goes to the dead letters and holds nothing up."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from thumbwheel import errors, tracing
from thumbwheel.stream import deadletter, topics
from thumbwheel.stream.log import Log, Producer, Record, TopicPartition
from thumbwheel.v1.events_pb2 import (
    ComparedResponse,
    ComparisonEvent,
    ComparisonSource,
    ComparisonState,
    GenerationEvent,
    ThumbEvent,
)
from thumbwheel.v1.policy_pb2 import Role
from thumbwheel.v1.preference_pb2 import Preference, ThumbValue
from trainer import metrics
from trainer.buffer import Buffer
from trainer.prompts import Prompts
from trainer.samples import Demonstration, Kind, Pair, Sample, Thumb, Tokens
from trainer.voting import Voting

logger = logging.getLogger(__name__)

_VERDICTS = {
    Preference.PREFERENCE_A: 1,
    Preference.PREFERENCE_B: -1,
    Preference.PREFERENCE_TIE: 0,
    Preference.PREFERENCE_BOTH_BAD: 0,
}
"""What is said of a comparison in a single respect: A is the chosen response."""
_SOURCES = {
    ComparisonSource.COMPARISON_SOURCE_VOTE: "vote",
    ComparisonSource.COMPARISON_SOURCE_EDIT: "edit",
    ComparisonSource.COMPARISON_SOURCE_THUMBS: "thumbs",
}
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

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self._vocab_size

    def encode(self, event: ComparisonEvent) -> Pair:
        """The sample of an accepted comparison. Raises `errors.InvalidArgument` naming the field that is wrong."""
        chosen, rejected = self._response(event.chosen), self._response(event.rejected)
        prompt = self._fitting(event, {"chosen": chosen, "rejected": rejected})
        if chosen == rejected:
            raise errors.InvalidArgument("is the same as chosen: there is nothing to learn.", field="rejected")
        return Pair(
            **_common(event, event.comparison_id, event.chosen, event.rejected),
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            tie=event.tie,
            margin=event.strength if event.HasField("strength") and math.isfinite(event.strength) else 0.0,
            aspects=tuple((a.aspect, _VERDICTS[a.preference]) for a in event.aspects if a.preference in _VERDICTS),
            source=_SOURCES.get(event.source, ""),
            writers=(_writer(event.chosen), _writer(event.rejected)),
        )

    def demonstration(self, event: ComparisonEvent) -> Demonstration:
        """What a person wrote in an accepted comparison, as a demonstration. Raises `errors.InvalidArgument`."""
        response = self._response(event.chosen)
        prompt = self._fitting(event, {"chosen": response})
        return Demonstration(**_common(event, demonstration_id(event)), prompt=prompt, response=response)

    def thumb(self, event: ThumbEvent) -> Thumb:
        """The sample of an accepted thumb. Raises `errors.InvalidArgument` naming the field that is wrong."""
        response = self._response(event.response)
        prompt = self._fitting(event, {"response": response})
        if event.value not in (ThumbValue.THUMB_VALUE_UP, ThumbValue.THUMB_VALUE_DOWN):
            raise errors.InvalidArgument(f"is {event.value}, neither up nor down.", field="value")
        liked = event.value == ThumbValue.THUMB_VALUE_UP
        return Thumb(**_common(event, event.thumb_id, event.response), prompt=prompt, response=response, liked=liked)

    def asked(self, event: ComparisonEvent | ThumbEvent | GenerationEvent, *, room: int) -> Tokens:
        """The prompt alone, to be answered in up to `room` tokens. Raises `errors.InvalidArgument`."""
        prompt = self._prompt(event)
        self._require_known("prompt_token_ids", prompt)
        return prompt[-(self._max_length - room) :]

    def _fitting(self, event: ComparisonEvent | ThumbEvent, responses: Mapping[str, Tokens]) -> Tokens:
        """The prompt, as far as the responses leave room for it. Raises `errors.InvalidArgument`."""
        prompt = self._prompt(event)
        if not math.isfinite(event.weight) or event.weight <= 0:
            raise errors.InvalidArgument(f"is {event.weight}, not a positive number.", field="weight")
        self._require_known("prompt_token_ids", prompt)
        for field, ids in responses.items():
            self._require_known(f"{field}.token_ids", ids)
        longest = max(responses, key=lambda field: len(responses[field]))
        room = self._max_length - len(responses[longest])
        if room < 1:
            raise errors.InvalidArgument(
                f"has {len(responses[longest])} tokens and leaves no room for a prompt in {self._max_length}.",
                field=longest,
                remedy="Raise --max-length.",
            )
        return prompt[-room:]

    def _require_known(self, field: str, ids: Tokens) -> None:
        if (top := max(ids)) >= self._vocab_size:
            raise errors.InvalidArgument(f"has {top}, but the vocabulary ends at {self._vocab_size - 1}.", field=field)

    def _prompt(self, event: ComparisonEvent | ThumbEvent | GenerationEvent) -> Tokens:
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

    def _response(self, response: ComparedResponse) -> Tokens:
        # A scorer is asked about a text, so it learns from the text, not from how it was cut into tokens.
        if response.token_ids and not self._scores_text:
            return tuple(response.token_ids)
        ids = self.tokenizer(response.text, add_special_tokens=False)["input_ids"]
        return (*(int(token) for token in ids), int(self.tokenizer.eos_token_id))


def _writer(response: ComparedResponse) -> str:
    versions = {span.version for span in response.spans}
    return versions.pop() if len(versions) == 1 else ""


class Ingest:
    """Reads what objectives that learn from `kinds` want into a buffer, prompts into `prompts`, and what was shown and
    voted on into `voting`, where these are wanted. Keeps its place itself; the broker is only told for its lag.
    """

    def __init__(
        self,
        log: Log,
        producer: Producer,
        encoder: Encoder,
        *,
        task: str,
        start: Mapping[TopicPartition, int],
        topic_ids: Mapping[str, str],
        kinds: Collection[Kind] = (Pair,),
        prompts: Prompts | None = None,
        prompt_room: int = 0,
        unjudged_prompts: bool = False,
        voting: Voting | None = None,
        learns_from: Callable[[Sample], bool] = lambda sample: True,
        on_retraction: Callable[[str], None] = lambda sample_id: None,
    ) -> None:
        """`prompt_room` are the tokens of a response to a prompt; `unjudged_prompts` takes those, too, that nobody gave
        feedback on. Samples that `learns_from` does not want are passed over. `on_retraction` hears of the ids that are
        taken back.
        """
        self._name = f"trainer-{task}"
        self._task = task
        self._producer = producer
        self._encoder = encoder
        self._kinds, self._prompts, self._room = frozenset(kinds), prompts, prompt_room
        self._unjudged_prompts, self._voting = unjudged_prompts and prompts is not None, voting
        self._learns_from = learns_from
        self._on_retraction = on_retraction
        wanted = []
        if prompts is not None or self._kinds & {Pair, Demonstration}:
            wanted.append(topics.COMPARISONS)
        if prompts is not None or Thumb in self._kinds:
            wanted.append(topics.THUMBS)
        if self._unjudged_prompts or voting is not None:
            wanted.append(topics.GENERATIONS)
        self._consumer = log.consumer(wanted, group=self._name, start=start, topic_ids=topic_ids)

    def read(self, buffer: Buffer, timeout: float) -> Sequence[str]:
        """Takes in what there is, waiting up to `timeout` seconds for something. Returns the ids of samples that were
        learnt and are now retracted. Raises `errors.Unavailable` where a dead letter cannot be delivered.
        """
        retracted: list[str] = []
        for record in self._consumer.poll(timeout):
            try:
                trace = tracing.of_record(record.headers)
                match record.topic:
                    case topics.COMPARISONS:
                        retracted += self._comparison(deadletter.decode(ComparisonEvent, record), buffer, trace)
                    case topics.THUMBS:
                        retracted += self._thumb(deadletter.decode(ThumbEvent, record), buffer, trace)
                    case _:
                        self._generation(deadletter.decode(GenerationEvent, record))
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

    def lag(self) -> dict[str, int]:
        """Records by topic that are there and not read. Raises `errors.Unavailable`."""
        positions, found = self._consumer.positions(), dict[str, int]()
        for tp, end in self._consumer.end_offsets().items():
            found[tp.topic] = found.get(tp.topic, 0) + max(0, end - positions.get(tp, 0))
        return found

    def _comparison(self, event: ComparisonEvent, buffer: Buffer, trace: str) -> list[str]:
        _require_id("comparison_id", event.comparison_id)
        wanted: dict[str, Callable[[], Sample]] = {}
        if Pair in self._kinds:
            wanted[event.comparison_id] = lambda: self._encoder.encode(event)
        retracted = event.state == ComparisonState.COMPARISON_STATE_RETRACTED
        # What is retracted says no more whether it was a demonstration.
        if Demonstration in self._kinds and (event.demonstration or retracted):
            wanted[demonstration_id(event)] = lambda: self._encoder.demonstration(event)
        return self._take(event, event.comparison_id, wanted, buffer, trace)

    def _thumb(self, event: ThumbEvent, buffer: Buffer, trace: str) -> list[str]:
        _require_id("thumb_id", event.thumb_id)
        wanted: dict[str, Callable[[], Sample]] = {}
        if Thumb in self._kinds:
            wanted[event.thumb_id] = lambda: self._encoder.thumb(event)
        return self._take(event, event.thumb_id, wanted, buffer, trace)

    def _generation(self, event: GenerationEvent) -> None:
        """Only what people asked, and prompts only where they agreed to be learnt from: nobody has curated them."""
        if event.bulk:
            return
        # Who does not agree to be learnt from gives no thumb either that comes here.
        if self._voting is not None and (event.consent or not event.HasField("consent")):
            self._voting.show(len(event.generation.token_ids))
        if self._unjudged_prompts and self._prompts is not None and event.consent:
            prompt_id = event.generation.prompt_id
            _require_id("generation.prompt_id", prompt_id)
            self._prompts.add(prompt_id, self._encoder.asked(event, room=self._room))

    def _take(
        self,
        event: ComparisonEvent | ThumbEvent,
        source: str,
        wanted: Mapping[str, Callable[[], Sample]],
        buffer: Buffer,
        traceparent: str,
    ) -> list[str]:
        """Buffers or retracts. Returns the ids of what was learnt and is now retracted."""
        if event.state == ComparisonState.COMPARISON_STATE_RETRACTED:
            metrics.RETRACTIONS.labels(self._task).inc()
            if self._prompts is not None:
                self._prompts.retract(source)
                buffer.drop(buffer.of_source(source))
            for sample_id in wanted:
                self._on_retraction(sample_id)
            return [sample_id for sample_id in wanted if buffer.retract(sample_id, event.revision)]
        if event.state != ComparisonState.COMPARISON_STATE_ACCEPTED:
            raise errors.InvalidArgument(f"is {event.state}, neither accepted nor retracted.", field="state")
        for sample_id, make in wanted.items():
            buffer.restore(sample_id, event.revision)
            if buffer.reweigh(sample_id, event.weight):
                continue
            if sample_id in buffer:
                metrics.DUPLICATES.labels(self._task).inc()
            elif self._learns_from(sample := make()):
                buffer.add(dataclasses.replace(sample, traceparent=traceparent), time.monotonic())
                if self._voting is not None and isinstance(sample, Thumb):
                    self._voting.vote(len(sample.response))
                if traceparent:
                    tracing.record("trainer.ingest", parent=traceparent, began=time.time(), task=self._task)
        if self._prompts is not None:
            self._prompts.add(source, self._encoder.asked(event, room=self._room))
        return []

    def _bury(self, record: Record, reason: str) -> None:
        asyncio.run(deadletter.bury(self._producer, record, reason=reason, consumer=self._name))


def demonstration_id(event: ComparisonEvent) -> str:
    """The id of the demonstration in a comparison, which is a sample of its own beside the pair."""
    return f"{event.comparison_id}/demonstration"


def _common(event: ComparisonEvent | ThumbEvent, sample_id: str, *responses: ComparedResponse) -> dict[str, Any]:
    """What samples have in common; `responses` are those that may be the policy's."""
    return {
        "id": sample_id,
        "weight": event.weight,
        "received_at": event.received_at.ToNanoseconds() / 1e9,
        "versions": tuple(sorted({span.version for response in responses for span in response.spans})),
    }


def _require_id(field: str, value: str) -> None:
    try:
        canonical = str(uuid.UUID(value))
    except ValueError:
        canonical = ""
    if not canonical or canonical != value:
        raise errors.InvalidArgument(f"{value[:64]!r} is no UUID.", field=field)
