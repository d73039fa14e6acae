"""Comparisons become samples, and what cannot be used becomes a dead letter that names the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonEvent, ComparisonState, DeadLetter
from thumbwheel.v1.policy_pb2 import Role
from trainer.buffer import Buffer
from trainer.ingest import Encoder, Ingest

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
