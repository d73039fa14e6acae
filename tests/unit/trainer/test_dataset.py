"""A file's lines become samples, and what is wrong with a line is said by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbwheel import errors
from trainer import dataset, samples
from trainer.encode import RecordEncoder
from trainer.samples import Demonstration, Group, Pair, Rollout, Sample, Thumb

EOS = 2
USER = {"role": "user", "content": "hi"}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def encoder(policy_path: Path) -> RecordEncoder:
    from transformers import AutoTokenizer

    return RecordEncoder(AutoTokenizer.from_pretrained(policy_path), 320, max_length=40)


@pytest.fixture(scope="module")
def ids(encoder: RecordEncoder) -> Any:
    return encoder._plain


def sample_of(encoder: RecordEncoder, fields: dict[str, Any]) -> Sample:
    return encoder.sample(dataset.parse("file.jsonl:7", json.dumps(fields)))


def test_a_pair_comes_with_its_prompt_or_with_what_both_begin_with(encoder: RecordEncoder, ids: Any) -> None:
    expected = Pair(id="file.jsonl:7", prompt=ids("Say a"), chosen=(*ids(" b"), EOS), rejected=(*ids(" bc"), EOS))
    assert sample_of(encoder, {"prompt": "Say a", "chosen": " b", "rejected": " bc"}) == expected
    assert sample_of(encoder, {"chosen": "Say a b", "rejected": "Say a bc"}) == expected
    weighted = sample_of(encoder, {"prompt": "p", "chosen": "b", "rejected": "c", "weight": 2, "id": "x"})
    assert (weighted.id, weighted.weight) == ("x", 2.0)


def test_messages_are_seen_as_the_chat_template_says(encoder: RecordEncoder, ids: Any) -> None:
    prompt = (1, *ids("user\nhi"), EOS, *ids("\n"), 1, *ids("assistant\n"))
    expected = Pair(id="file.jsonl:7", prompt=prompt, chosen=(*ids("b"), EOS), rejected=(*ids("c"), EOS))
    rows: list[dict[str, Any]] = [
        {"prompt": [USER], "chosen": answer("b"), "rejected": answer("c")},
        {"chosen": [USER, *answer("b")], "rejected": [USER, *answer("c")]},
        {"prompt": [USER], "chosen": "b", "rejected": "c"},
    ]
    assert [sample_of(encoder, row) for row in rows] == [expected] * 3
    assert sample_of(encoder, {"messages": [USER, *answer("b")]}) == Demonstration(
        id="file.jsonl:7", prompt=prompt, response=(*ids("b"), EOS)
    )


def test_a_completion_is_a_thumb_with_a_label_and_a_demonstration_without(encoder: RecordEncoder, ids: Any) -> None:
    fields = {"prompt": "p", "completion": "b"}
    common = {"id": "file.jsonl:7", "prompt": ids("p"), "response": (*ids("b"), EOS)}
    assert sample_of(encoder, fields) == Demonstration(**common)
    for label in (True, False):
        assert sample_of(encoder, {**fields, "label": label}) == Thumb(**common, liked=label)


def test_rollouts_keep_their_tokens_and_what_is_known_of_them(encoder: RecordEncoder, ids: Any) -> None:
    fields = {
        "prompt": [10, 11],
        "responses": [[5, 6], [7]],
        "rewards": [1, -0.5],
        "logprobs": [[-0.1, -0.2], [-3]],
        "finished": [True, False],
        "reference_reward": 0.25,
    }
    assert sample_of(encoder, fields) == Group(
        id="file.jsonl:7",
        prompt=(10, 11),
        rollouts=(Rollout((5, 6), 1.0, (-0.1, -0.2)), Rollout((7,), -0.5, (-3,), finished=False)),
        reference_reward=0.25,
    )
    text = {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 2], "finished": [True, False]}
    found = sample_of(encoder, text)
    assert found.responses == ((*ids("a"), EOS), ids("b"))  # what was cut does not end


def test_prompts_lose_their_beginning_and_responses_nothing(encoder: RecordEncoder, ids: Any) -> None:
    found = sample_of(encoder, {"prompt": "a" * 100 + "bc", "completion": "d" * 37})
    assert found.prompt == ids("bc")
    assert len(found.responses[0]) == 38
    with pytest.raises(errors.InvalidArgument, match=r"file.jsonl:7: response: has 41 tokens .* Raise --max-length"):
        sample_of(encoder, {"prompt": "a", "completion": "d" * 40})
    with pytest.raises(errors.InvalidArgument, match=r"file.jsonl:7: token ids: have 320"):
        sample_of(encoder, {"prompt": [320], "completion": "d"})


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
GROUP = {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 2]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], r"f:3: is no JSON object"),
        ({}, r"f:3: has only nothing, of which no sample can be made. See `python -m trainer --data FILE --help`"),
        ({"question": "x", "answer": "y"}, r"f:3: has only answer, question"),
        ({"prompt": "p", "chosen": "a"}, r"f:3: rejected: is missing"),
        ({"chosen": "abc", "rejected": "abd"}, r"f:3: prompt: is missing"),
        ({"chosen": "abc", "rejected": ["abd"]}, r"f:3: chosen: and rejected are not of one form"),
        (PAIR | {"rejected": "a"}, r"f:3: rejected: is the same as chosen"),
        (PAIR | {"chosen": " "}, r"f:3: chosen: is empty. Leave the line out"),
        (PAIR | {"chosen": 5}, r"f:3: chosen: is 5, neither text, messages nor token ids"),
        (PAIR | {"prompt": [3, -1]}, r"f:3: prompt: has -1, which is no token id"),
        (PAIR | {"prompt": [{"role": "user"}]}, r"f:3: prompt\[0\]: is .*, no message. Use \{role, content\}"),
        (PAIR | {"chosen": [USER]}, r"f:3: chosen: has the messages user. A response is one message of the assistant"),
        (PAIR | {"chosen": answer(" ")}, r"f:3: chosen: is empty"),
        (PAIR | {"weight": 0}, r"f:3: weight: is 0. Use a positive number"),
        (PAIR | {"weight": True}, r"f:3: weight: is True"),
        (PAIR | {"id": 7}, r"f:3: id: is 7. Use a string"),
        ({"completion": "x"}, r"f:3: prompt: is missing"),
        ({"prompt": "p", "completion": "x", "label": 1}, r"f:3: label: is 1. Use true for a thumb up"),
        ({"messages": [USER]}, r"f:3: messages: is no list of at least two"),
        ({"messages": [USER, USER]}, r"f:3: messages\[1\]: has the messages user"),
        ({"prompt": "p", "responses": []}, r"f:3: responses: is no list of responses"),
        (GROUP | {"rewards": [1]}, r"f:3: rewards: is \[1\]. Give 2 numbers"),
        (GROUP | {"rewards": [1, "x"]}, r"f:3: rewards: is .*. Give 2 numbers"),
        (GROUP | {"finished": [True]}, r"f:3: finished: is \[True\]. Give 2 times true or false"),
        (GROUP | {"logprobs": [[-1.0]]}, r"f:3: logprobs: is .*. Give 2 lists"),
        (
            GROUP | {"logprobs": [[-1.0], [-1.0]]},
            r"logprobs\[0\]: has 1 numbers, .* Give the response as the",
        ),
        (GROUP | {"responses": [[1], [2]], "logprobs": [[0.5], [0]]}, r"logprobs\[0\]: is no list of numbers up to 0"),
        (GROUP | {"responses": [[1], [2]], "logprobs": [[-1, -1], [0]]}, r"logprobs\[0\]: has 2 numbers"),
        (GROUP | {"reference_reward": "x"}, r"f:3: reference_reward: is 'x'"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(fields: object, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        dataset.parse("f:3", json.dumps(fields))


def test_a_file_says_which_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps(GROUP) + "\n{oops\n")
    with pytest.raises(errors.InvalidArgument, match=r"^pairs.jsonl:4: is no JSON"):
        dataset.read(path)
    assert [(record.where, record.kind) for record in dataset.read(path, limit=2)] == [
        ("pairs.jsonl:1", Pair),
        ("pairs.jsonl:3", Group),
    ]
    path.write_text(2 * (json.dumps(PAIR | {"id": "x"}) + "\n"))
    with pytest.raises(errors.InvalidArgument, match=r"pairs.jsonl:2: id: is 'x', as in pairs.jsonl:1"):
        dataset.read(path)
    path.write_text("\n")
    with pytest.raises(errors.InvalidArgument, match=r"pairs.jsonl: holds no line"):
        dataset.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(errors.InvalidArgument, match=r"pairs.jsonl: is no UTF-8"):
        dataset.read(path)
    with pytest.raises(errors.NotFound, match=r"nowhere.jsonl cannot be read: No such file"):
        dataset.read(tmp_path / "nowhere.jsonl")


tokens = st.lists(st.integers(0, 300), min_size=1, max_size=5).map(tuple)
common = {"id": st.text(min_size=1), "prompt": tokens, "weight": st.floats(0.1, 9), "received_at": st.floats(0, 1e9)}
rollouts = st.builds(
    Rollout, tokens, st.floats(-9, 9), st.lists(st.floats(-9, 0), max_size=5).map(tuple), st.booleans()
)
anything = st.one_of(
    st.builds(Pair, **common, chosen=tokens, rejected=tokens, versions=st.just(("policy-000001",))),
    st.builds(Thumb, **common, response=tokens, liked=st.booleans()),
    st.builds(Demonstration, **common, response=tokens),
    st.builds(
        Group,
        **common,
        rollouts=st.lists(rollouts, min_size=1, max_size=3).map(tuple),
        reference_reward=st.none() | st.floats(-9, 9),
    ),
)


@given(sample=anything)
def test_samples_of_every_kind_survive_being_saved(sample: Sample) -> None:
    assert samples.from_fields(json.loads(json.dumps(samples.to_fields(sample)))) == sample


def test_what_the_first_release_saved_was_a_pair() -> None:
    fields = {"id": "x", "prompt": [1], "chosen": [2], "rejected": [3], "weight": 1.0, "received_at": 0.0}
    assert samples.from_fields({**fields, "versions": []}) == Pair(id="x", prompt=(1,), chosen=(2,), rejected=(3,))
