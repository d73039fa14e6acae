"""Comparisons become samples, and what cannot be used becomes a dead letter that names the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message

from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, DeadLetter, GenerationEvent, ThumbEvent
from thumbwheel.v1.policy_pb2 import Role
from thumbwheel.v1.preference_pb2 import ThumbValue
from trainer.buffer import Buffer
from trainer.ingest import Encoder, Ingest
from trainer.prompts import Prompts
from trainer.samples import Demonstration, Pair, Thumb
from trainer.voting import Voting

EOS = 2


def comparison(number: int = 1) -> ComparisonEvent:
    event = ComparisonEvent(
        comparison_id=f"01890000-0000-7000-8000-{number:012d}",
        state=ComparisonState.COMPARISON_STATE_ACCEPTED,
        prompt_token_ids=range(10, 20),
        weight=1.0,
    )
    event.chosen.text, event.rejected.text = "a", "bc"
    event.chosen.token_ids.extend([50, 51, EOS])
    event.rejected.token_ids.extend([60, 61])
    event.chosen.spans.add(version="policy-000002", start=0, end=1)
    event.chosen.spans.add(version="policy-000003", start=1, end=3)
    event.rejected.spans.add(version="policy-000003", start=0, end=2)
    event.received_at.FromMilliseconds(1_500)
    return event


@pytest.fixture(scope="module")
def encoder(policy_path: Path) -> Encoder:
    return Encoder(policy_path, max_length=16, scores_text=False)


def test_a_policy_learns_the_tokens_as_they_were_generated(encoder: Encoder) -> None:
    sample = encoder.encode(comparison())
    assert sample.prompt == tuple(range(10, 20))
    assert (sample.chosen, sample.rejected) == ((50, 51, EOS), (60, 61))
    assert sample.versions == ("policy-000002", "policy-000003")
    assert (sample.weight, sample.received_at) == (1.0, 1.5)


def test_a_text_that_a_person_wrote_is_tokenised_and_ends(encoder: Encoder) -> None:
    event = comparison()
    event.chosen.ClearField("token_ids")
    assert encoder.encode(event).chosen == (*encoder.tokenizer("a")["input_ids"], EOS)


def test_a_prompt_that_no_model_of_ours_was_asked_is_rendered_as_it_would_be(encoder: Encoder) -> None:
    event = comparison()
    event.ClearField("prompt_token_ids")
    event.prompt.chat.messages.add(role=Role.ROLE_USER, content="a")
    turns = [{"role": "user", "content": "a"}]
    asked = encoder.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    room = 16 - 3
    assert encoder.encode(event).prompt == tuple(asked)[-room:]
    event.prompt.text = "bc"
    assert encoder.encode(event).prompt == tuple(encoder.tokenizer("bc")["input_ids"])
    event.prompt.tokens.ids.extend([7, 8])
    assert encoder.encode(event).prompt == (7, 8)


def test_a_scorer_learns_the_text_and_the_end_whatever_was_generated(policy_path: Path) -> None:
    sample = Encoder(policy_path, max_length=16, scores_text=True).encode(comparison())
    letters = [encoder_ids[0] for encoder_ids in map(_ids(policy_path), "abc")]
    assert sample.chosen == (letters[0], EOS)
    assert sample.rejected == (letters[1], letters[2], EOS)


def test_prompts_lose_their_beginning_and_responses_nothing(encoder: Encoder) -> None:
    event = comparison()
    event.rejected.token_ids.extend(range(70, 80))
    sample = encoder.encode(event)
    assert sample.prompt == tuple(range(16, 20))
    assert len(sample.rejected) == 12
    assert sample.chosen == (50, 51, EOS)


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda e: e.ClearField("prompt_token_ids"), "prompt_token_ids"),
        (lambda e: e.prompt_token_ids.append(99_999), "prompt_token_ids"),
        (lambda e: e.chosen.token_ids.append(99_999), "chosen.token_ids"),
        (lambda e: e.rejected.CopyFrom(e.chosen), "rejected"),
        (lambda e: e.rejected.token_ids.extend(range(20)), "rejected"),
        (lambda e: setattr(e, "weight", 0.0), "weight"),
        (lambda e: setattr(e, "weight", float("nan")), "weight"),
    ],
)
def test_what_is_wrong_is_named(spoil: Callable[[ComparisonEvent], None], field: str, encoder: Encoder) -> None:
    event = comparison()
    spoil(event)
    with pytest.raises(errors.InvalidArgument) as raised:
        encoder.encode(event)
    assert raised.value.field == field


def test_the_stream_is_read_once_and_poison_goes_aside(encoder: Encoder) -> None:
    log = MemoryLog()
    log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
    producer = log.producer()

    def send(*events: ComparisonEvent | bytes) -> None:
        for event in events:
            value = event if isinstance(event, bytes) else event.SerializeToString()
            producer.send(topics.COMPARISONS, b"key", value).result(1.0)

    def retraction(number: int) -> ComparisonEvent:
        event = comparison(number)
        event.state = ComparisonState.COMPARISON_STATE_RETRACTED
        return event

    nameless, stateless = comparison(4), comparison(5)
    nameless.comparison_id = "../4"
    stateless.state = ComparisonState.COMPARISON_STATE_UNSPECIFIED
    send(comparison(1), b"\xff", comparison(1), comparison(2), nameless, retraction(2), stateless, comparison(3))
    ingest = Ingest(log, producer, encoder, task="policy", start={}, topic_ids={})
    buffer = Buffer()
    assert ingest.read(buffer, 1.0) == []
    assert [sample.id[-1] for sample in buffer.oldest(9)] == ["1", "3"]
    assert list(ingest.positions().values()) == [8]

    buffer.learnt([comparison(1).comparison_id])
    send(retraction(1), retraction(1), comparison(2))
    assert ingest.read(buffer, 1.0) == [comparison(1).comparison_id]
    assert len(buffer) == 1

    again = comparison(1), comparison(3)
    for event in again:
        event.revision, event.weight = 3, 0.5
    send(*again)
    assert ingest.read(buffer, 1.0) == []
    assert [(sample.id[-1], sample.weight) for sample in buffer.oldest(9)] == [("3", 0.5)], "1 is learnt already"

    letters = log.consumer([topics.DEADLETTER], group="test").poll(1.0)
    found = [DeadLetter.FromString(record.value) for record in letters]
    assert [letter.offset for letter in found] == [1, 4, 6]
    assert [letter.reason.split(":")[0] for letter in found] == ["value", "comparison_id", "state"]
    assert found[0].value == b"\xff"
    producer.close(1.0)


def _ids(path: Path) -> Callable[[str], list[int]]:
    tokenizer = Encoder(path, max_length=16, scores_text=True).tokenizer
    return lambda text: list(tokenizer(text)["input_ids"])


class Stream:
    """A log with an ingest that takes everything that a policy can learn from, and prompts."""

    def __init__(self, encoder: Encoder) -> None:
        self.log = MemoryLog()
        self.log.ensure_topics(topics.topics(partitions=1, replication=1), 1.0)
        self.producer = self.log.producer()
        self.prompts, self.buffer, self.gone, self.voting = Prompts(uses=1), Buffer(), list[str](), Voting()
        self.ingest = Ingest(
            self.log,
            self.producer,
            encoder,
            task="policy",
            start={},
            topic_ids={},
            kinds={Pair, Thumb, Demonstration},
            prompts=self.prompts,
            prompt_room=6,
            unjudged_prompts=True,
            voting=self.voting,
            on_retraction=self.gone.append,
        )

    def read(self, topic: str, *values: Message | bytes) -> list[str]:
        """Sends and reads; returns what was learnt and is retracted."""
        for value in values:
            data = value if isinstance(value, bytes) else value.SerializeToString()
            self.producer.send(topic, b"key", data).result(1.0)
        return list(self.ingest.read(self.buffer, 1.0))

    def reasons(self) -> list[str]:
        """Why there are dead letters, and what is wrong in each."""
        letters = self.log.consumer([topics.DEADLETTER], group="test").poll(0.0)
        return [DeadLetter.FromString(record.value).reason for record in letters]


def thumb(number: int = 1) -> ThumbEvent:
    event = ThumbEvent(
        thumb_id=f"01890000-0000-7000-8000-{number:012d}",
        state=ComparisonState.COMPARISON_STATE_ACCEPTED,
        prompt_token_ids=range(10, 20),
        value=ThumbValue.THUMB_VALUE_DOWN,
        weight=0.5,
    )
    event.response.token_ids.extend([50, 51, EOS])
    event.response.spans.add(version="policy-000004", start=0, end=3)
    return event


def test_a_thumb_is_a_sample_and_is_retracted_as_one(encoder: Encoder) -> None:
    stream = Stream(encoder)
    stream.read(topics.THUMBS, thumb(1), thumb(2), thumb(1))
    (one, _) = stream.buffer.oldest(9)
    assert isinstance(one, Thumb)
    assert (one.prompt, one.response, one.liked, one.weight) == (tuple(range(10, 20)), (50, 51, EOS), False, 0.5)
    assert one.versions == ("policy-000004",)
    gone = thumb(1)
    gone.state = ComparisonState.COMPARISON_STATE_RETRACTED
    assert stream.read(topics.THUMBS, gone) == []
    assert [sample.id[-1] for sample in stream.buffer.oldest(9)] == ["2"]
    stream.buffer.learnt([thumb(2).thumb_id])
    gone.thumb_id = thumb(2).thumb_id
    assert stream.read(topics.THUMBS, gone) == [gone.thumb_id]
    assert stream.gone[-1] == gone.thumb_id
    assert stream.reasons() == []


def test_poison_oversized_and_empty_records_go_aside_and_duplicates_count_once(encoder: Encoder) -> None:
    stream = Stream(encoder)
    oversized, silent, valueless, infinite = thumb(2), thumb(3), thumb(4), thumb(5)
    oversized.response.token_ids.extend(range(60, 80))
    silent.ClearField("prompt_token_ids")
    valueless.ClearField("value")
    infinite.weight = float("inf")
    stream.read(topics.THUMBS, b"", b"\xff\xff", thumb(1), oversized, silent, valueless, infinite, thumb(1), thumb(6))
    assert [sample.id[-1] for sample in stream.buffer.oldest(9)] == ["1", "6"]
    fields = [reason.split(":")[0] for reason in stream.reasons()]
    assert fields == ["value", "value", "response", "prompt_token_ids", "value", "weight"]
    stream.read(topics.COMPARISONS, b"", comparison(7), comparison(7))
    assert len(stream.buffer) == 3
    assert len(stream.prompts) == 1, "thumbs and comparisons are about the same prompt"


def test_an_edit_is_a_pair_and_a_demonstration_and_both_go_with_its_retraction(encoder: Encoder) -> None:
    stream = Stream(encoder)
    event = comparison(1)
    event.demonstration = True
    event.chosen.ClearField("token_ids")
    event.chosen.ClearField("spans")
    stream.read(topics.COMPARISONS, event)
    pair, shown = stream.buffer.oldest(9)
    assert isinstance(pair, Pair)
    assert isinstance(shown, Demonstration)
    assert (shown.id, shown.response, shown.versions) == (f"{event.comparison_id}/demonstration", pair.chosen, ())
    stream.buffer.learnt([pair.id])
    event.state = ComparisonState.COMPARISON_STATE_RETRACTED
    assert stream.read(topics.COMPARISONS, event) == [event.comparison_id]
    assert (len(stream.buffer), len(stream.prompts)) == (0, 0)


def test_prompts_keep_room_for_the_answer_and_unjudged_ones_need_consent(encoder: Encoder) -> None:
    stream = Stream(encoder)
    event = comparison(1)
    event.prompt_token_ids.extend(range(20, 40))
    stream.read(topics.COMPARISONS, event)
    (prompt,) = stream.prompts.take(9)
    assert prompt.tokens == tuple(range(30, 40)), "the end of the prompt, with 6 of 16 tokens left for the answer"
    asked = []
    for number, (consent, bulk) in enumerate([(True, False), (False, False), (None, False), (True, True)]):
        generated = GenerationEvent(prompt_token_ids=[100 + number], consent=consent, bulk=bulk)
        generated.generation.prompt_id = f"01890000-0000-7000-9000-{number:012d}"
        asked.append(generated)
    stream.read(topics.GENERATIONS, *asked)
    assert [prompt.tokens for prompt in stream.prompts.take(9)] == [(100,)]


def test_it_is_counted_what_was_shown_to_people_and_what_of_it_got_a_thumb_once(encoder: Encoder) -> None:
    stream, shown = Stream(encoder), list[GenerationEvent]()
    for consent, bulk, tokens in ((True, False, 5), (None, False, 3), (False, False, 5), (True, True, 5)):
        event = GenerationEvent(prompt_token_ids=[100], consent=consent, bulk=bulk)
        event.generation.prompt_id = f"01890000-0000-7000-9000-{len(shown):012d}"
        event.generation.token_ids.extend(range(tokens))
        shown.append(event)
    stream.read(topics.GENERATIONS, *shown)
    first, again = thumb(1), thumb(1)
    again.weight = 0.5
    stream.read(topics.THUMBS, first, first, again, thumb(2))
    lengths = {len(sample.response) for sample in stream.buffer.oldest(2) if isinstance(sample, Thumb)}
    (stratum,) = {each.bit_length() for each in lengths}
    assert stream.voting.shown == {3: 1, 2: 1}
    assert stream.voting.voted == {stratum: 2}


def test_the_lag_is_what_is_there_and_not_read(encoder: Encoder) -> None:
    stream = Stream(encoder)
    stream.read(topics.THUMBS, thumb(1))
    for number in (2, 3):
        stream.producer.send(topics.THUMBS, b"key", thumb(number).SerializeToString()).result(1.0)
    assert stream.ingest.lag()[topics.THUMBS] == 2
    assert stream.ingest.lag()[topics.COMPARISONS] == 0
