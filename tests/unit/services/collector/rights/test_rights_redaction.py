"""What leaves the collector: redacted where a tenant asks for it, and otherwise as it was."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.collector import outbox
from services.collector.database import Database
from services.collector.relay import Relay
from services.collector.rights import pii
from services.collector.rights.redaction import Redaction
from services.collector.rights.tenants import TenantRules, Tenants
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment, eventually
from thumbwheel import errors
from thumbwheel.stream import topics
from thumbwheel.stream.memory import MemoryLog
from thumbwheel.v1.events_pb2 import ComparisonEvent, DeadLetter, FeedbackEvent, GenerationEvent
from thumbwheel.v1.policy_pb2 import Prompt, TokenIds


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to ada.l+x@mail.example.co.uk!", "Write to [email]!"),
        ("jürgen@straße.example", "[email]"),
        ("+49 30 1234567, (555) 123-4567; 030-123 4567", "[phone], [phone]; [phone]"),
        ("card 4111 1111 1111 1111 till 2029", "card [card] till 2029"),
        ("5500-0000-0000-0004", "[card]"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", "[iban] AND MORE"),
        ("GB82WEST12345698765432.", "[iban]."),
        # What only looks like it: a wrong check digit, a date, an address, a number, an at-sign.
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),
        ("DE88370400440532013000", "DE88370400440532013000"),
        ("2026-11-22 22:31, 192.168.100.200, 3.14159265358979", "2026-11-22 22:31, 192.168.100.200, 3.14159265358979"),
        ("a @ b, @home, x@y", "a @ b, @home, x@y"),
    ],
)
def test_the_builtin_knows_forms(text: str, redacted: str) -> None:
    assert pii.redact(text) == redacted


FOUND = st.sampled_from(["ada@example.com", "+49 30 1234567", "4111 1111 1111 1111", "GB82WEST12345698765432"])
TEXT = st.text(alphabet="aZß 0159.,@+-()/[]\n'", max_size=40)


@given(st.lists(st.one_of(TEXT, FOUND), max_size=8).map("".join))
def test_redacting_again_changes_nothing(text: str) -> None:
    once = pii.redact(text)
    assert pii.redact(once) == once


@given(st.lists(st.text(alphabet="abcdefß ,;!?\n", max_size=20), min_size=2, max_size=5), FOUND)
def test_it_keeps_every_other_character(pieces: list[str], secret: str) -> None:
    text = f" ~{secret}~ ".join(pieces)
    placeholder = {"a": pii.EMAIL, "+": pii.PHONE, "4": pii.CARD, "G": pii.IBAN}[secret[0]]
    assert pii.redact(text) == f" ~{placeholder}~ ".join(pieces)


@given(st.text(alphabet=st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="@")))
def test_what_has_no_digit_and_no_at_sign_is_kept(text: str) -> None:
    assert pii.redact(text) == text


def upper(text: str) -> str:
    return text.upper()


def broken(text: str) -> str:
    raise KeyError(text)


def tenants(redact: str) -> Tenants:
    return Tenants(named={"clinic": TenantRules(redact=redact)})


def event(tenant: str, deployment: Deployment) -> ComparisonEvent:
    prompt = deployment.generation(words="I am ada@example.com").prompt
    made = ComparisonEvent(event_id="e", tenant=tenant, prompt=prompt, prompt_token_ids=[1, 2])
    made.chosen.text, made.rejected.text = "Hello ada@example.com", "Hello"
    for response in (made.chosen, made.rejected):
        response.token_ids.extend([3, 4])
        response.logprobs.extend([-0.5, -0.5])
    return made


def test_tokens_go_where_the_text_changes(deployment: Deployment) -> None:
    name, value = ComparisonEvent.DESCRIPTOR.full_name, event("clinic", deployment).SerializeToString()
    left = ComparisonEvent.FromString(Redaction(tenants("builtin")).outgoing(name, value))
    assert left.prompt.chat.messages[0].content == "I am [email]"
    assert (left.chosen.text, left.rejected.text) == ("Hello [email]", "Hello")
    assert (list(left.prompt_token_ids), list(left.chosen.token_ids), list(left.chosen.logprobs)) == ([], [], [])
    assert list(left.rejected.token_ids) == [3, 4]


def test_other_tenants_are_left_alone(deployment: Deployment) -> None:
    name, value = ComparisonEvent.DESCRIPTOR.full_name, event("other", deployment).SerializeToString()
    assert Redaction(tenants("builtin")).outgoing(name, value) is value
    value = event("clinic", deployment).SerializeToString()
    assert Redaction(Tenants()).outgoing(name, value) is value


def test_a_function_of_ones_own(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_redactor", sys.modules[__name__])
    name, value = ComparisonEvent.DESCRIPTOR.full_name, event("clinic", deployment).SerializeToString()
    left = ComparisonEvent.FromString(Redaction(tenants("own_redactor:upper")).outgoing(name, value))
    assert left.chosen.text == "HELLO ADA@EXAMPLE.COM"
    with pytest.raises(errors.InvalidArgument, match="own_redactor:broken raised KeyError") as raised:
        Redaction(tenants("own_redactor:broken")).outgoing(name, value)
    assert "ada@example.com" not in str(raised.value)


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json:decoder", "upper"])
def test_a_function_that_is_none_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(errors.FailedPrecondition, match="redact"):
        Redaction(tenants(name))


def test_a_prompt_of_tokens_cannot_be_redacted(deployment: Deployment) -> None:
    made = event("clinic", deployment)
    made.prompt.CopyFrom(Prompt(tokens=TokenIds(ids=[1])))
    with pytest.raises(errors.InvalidArgument, match="token ids"):
        Redaction(tenants("builtin")).outgoing(made.DESCRIPTOR.full_name, made.SerializeToString())


def test_of_a_dead_letter_no_value_leaves() -> None:
    letter = DeadLetter(event_id="e", reason="no message", value=b"\xffada@example.com")
    left = Redaction(tenants("builtin")).outgoing(letter.DESCRIPTOR.full_name, letter.SerializeToString())
    assert DeadLetter.FromString(left) == DeadLetter(event_id="e", reason="no message")


async def test_the_relay_publishes_nothing_unredacted(
    database: Database, deployment: Deployment, log: MemoryLog, tmp_path: Path
) -> None:
    mine = Deployment(deployment.key, "clinic")
    a, b = mine.pair("I write to ada@example.com.", "No.")
    await parts.store(database, a, b)
    await mine.submit(database, parts.comparison(a, b))
    await mine.submit(database, parts.comment(a, "call +49 30 1234567"))
    tokens = GenerationEvent()
    tokens.CopyFrom(mine.generation("x"))
    tokens.prompt.CopyFrom(Prompt(tokens=TokenIds(ids=[1])))
    await parts.store(database, tokens)
    await mine.submit(database, parts.edit(tokens, "better"))
    relay = Relay(database, log, parts.settings(tmp_path), Redaction(tenants("builtin")))
    task = asyncio.create_task(relay.run())
    levels = await eventually(lambda: database.read(outbox.levels), lambda found: found.unpublished == 0)
    assert levels.unpublished == 0
    task.cancel()
    await asyncio.wait([task])
    comparisons = parts.comparisons(log.records(topics.COMPARISONS))
    assert [one.chosen.text for one in comparisons] == ["I write to [email]."]
    comments = [one.record.feedback.comment.text for one in parts.feedback_events(log.records(topics.FEEDBACK))]
    assert sorted(comments) == ["", "", "call [phone]"]
    assert FeedbackEvent.DESCRIPTOR.full_name in {
        dict(r.headers)["schema"].decode() for r in log.records(topics.FEEDBACK)
    }
    refused = await database.read(lambda c: c.exec_driver_sql("select refused from outbox where refused <> ''").all())
    assert [row[0] for row in refused] == ["prompt.tokens: is token ids, which cannot be redacted."]
