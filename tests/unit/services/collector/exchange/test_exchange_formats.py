"""Every format says the same preference, and what is none is refused with the reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.collector.exchange import formats, rows, transcript
from services.collector.exchange.rows import Paired, Row, RowError, Turn, Unpaired

DIALOGUE = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And\n\nnow?"))

words = st.text(min_size=1, max_size=30).filter(lambda text: bool(text.strip()) and not text.isspace())
tricky = st.sampled_from(["\n\nHuman: x", "a\n\nAssistant:", " spaced ", "\n\nHuman:"])
contents = st.one_of(words, tricky).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
dialogues = st.lists(contents, min_size=1, max_size=5).map(
    lambda texts: tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
)
systems = st.one_of(st.just(()), contents.map(lambda text: (Turn("system", text),)))
prompts = st.builds(lambda system, turns: (*system, *turns), systems, dialogues)
pairs = st.builds(Paired, prompts, contents, contents)


@pytest.mark.parametrize("name", ["trl", "trl-chat", "hh", "openrlhf"])
@given(row=pairs)
def test_what_is_written_is_read_as_the_same(name: str, row: Paired) -> None:
    form = formats.FORMATS[name]
    try:
        fields = form.render(row)
    except RowError:
        # Only as text, and only what would be taken for something else.
        assert name in ("trl", "hh")
        marked = any("\n\nHuman:" in text or "\n\nAssistant:" in text for text in _texts(row))
        assert marked or row.prompt[0].role == "system"
        return
    read = json.loads(json.dumps(fields))
    assert form.parse(read) == row
    assert formats.detect(read) == name


@given(st.builds(Unpaired, st.one_of(dialogues), contents, st.booleans()))
def test_unpaired_too(row: Unpaired) -> None:
    form = formats.FORMATS["trl-unpaired"]
    try:
        fields = form.render(row)
    except RowError:
        assert any("\n\nHuman:" in text or "\n\nAssistant:" in text for text in _texts(row))
        return
    assert form.parse(json.loads(json.dumps(fields))) == row
    assert formats.detect(fields) == "trl-unpaired"


def _texts(row: Row) -> list[str]:
    said = [turn.content for turn in row.prompt]
    replies = [row.completion] if isinstance(row, Unpaired) else [row.chosen, row.rejected]
    # Joined to what comes before it, a text that begins with a line end may complete a mark.
    return [f"\n\n{text}" if text.startswith(("Human:", "Assistant:")) else text for text in said + replies]


def test_the_shapes_are_those_of_the_field() -> None:
    row = Paired(DIALOGUE, "Yes.", "No.")
    asked = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And\n\nnow?"
    prompt = [{"role": turn.role, "content": turn.content} for turn in DIALOGUE]
    yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    written = {name: form.render(row) for name, form in formats.FORMATS.items() if form.paired}
    assert written == {
        "trl": {"prompt": asked + "\n\nAssistant:", "chosen": "Yes.", "rejected": "No."},
        "trl-chat": {"prompt": prompt, "chosen": [yes], "rejected": [no]},
        "hh": {"chosen": asked + "\n\nAssistant: Yes.", "rejected": asked + "\n\nAssistant: No."},
        "openrlhf": {"chosen": [*prompt, yes], "rejected": [*prompt, no]},
    }
    single = Unpaired((Turn("user", "Hi"),), "Hello.", True)
    assert formats.FORMATS["trl-unpaired"].render(single) == {"prompt": "Hi", "completion": "Hello.", "label": True}
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]}
    assert formats.FORMATS["trl-unpaired"].parse({**chat, "label": True}) == single


def test_one_preference_has_one_digest_in_every_format() -> None:
    row = Paired(DIALOGUE, "Yes.", "No.")
    read = {rows.digest(form.parse(form.render(row))) for form in formats.FORMATS.values() if form.paired}
    assert read == {rows.digest(row)}
    assert rows.digest(Paired(DIALOGUE, "No.", "Yes.")) != rows.digest(row)
    assert rows.digest(DIALOGUE) != rows.digest(DIALOGUE[:2])


MALFORMED: list[tuple[str, dict[str, object], str]] = [
    ("trl", {"chosen": "a", "rejected": "b"}, "prompt: is missing"),
    ("trl", {"prompt": "p", "chosen": "a"}, "rejected: is missing"),
    ("trl", {"prompt": "p", "chosen": "a", "rejected": 3}, "rejected: is int, not text"),
    ("trl", {"prompt": " ", "chosen": "a", "rejected": "b"}, r"prompt\[0\].content: is empty"),
    ("trl", {"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "prompt: is not valid Unicode"),
    ("trl-unpaired", {"prompt": "p", "completion": "c", "label": 1}, "label: is neither true nor false"),
    ("trl-unpaired", {"prompt": "p", "label": True}, "completion: is missing"),
    ("trl-chat", {"prompt": [], "chosen": [], "rejected": []}, "prompt: is empty"),
    ("trl-chat", {"prompt": ["p"], "chosen": [], "rejected": []}, r"prompt\[0\]: is no message"),
    ("trl-chat", {"prompt": [{"role": "tool", "content": "p"}]}, r"prompt\[0\].role: is none of system"),
    ("trl-chat", {"prompt": [{"role": "system", "content": "p"}]}, "prompt: asks nothing"),
    ("trl-chat", {"prompt": [{"role": "user", "content": "p"}], "chosen": []}, "chosen: is not one message"),
    ("hh", {"chosen": "Hi", "rejected": "\n\nHuman: Hi"}, "chosen: does not begin with a turn of the human"),
    ("hh", {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}, "chosen: does not end with the assistant's reply"),
    (
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
        "do not share every turn but the last",
    ),
    (
        "openrlhf",
        {"chosen": [{"role": "user", "content": "p"}], "rejected": []},
        "chosen: does not end with the assistant's reply",
    ),
    ("openrlhf", {"chosen": "text", "rejected": []}, "chosen: is str, not a list of messages"),
]


@pytest.mark.parametrize(("name", "fields", "reason"), MALFORMED)
def test_what_is_none_says_why(name: str, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        formats.FORMATS[name].parse(fields)


@pytest.mark.parametrize("fields", [{}, {"text": "x"}, {"chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": 3}])
def test_what_is_of_no_format_says_so(fields: dict[str, object]) -> None:
    with pytest.raises(RowError, match="of no known format"):
        formats.detect(fields)


def test_an_empty_reply_is_a_reply() -> None:
    fields = {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
    assert formats.FORMATS["hh"].parse(fields) == Paired((Turn("user", "Hi"),), "", "b")
    assert transcript.parse("\n\nHuman:\n\nAssistant:", "x") == [Turn("user", ""), Turn("assistant", "")]
