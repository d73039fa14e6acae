"""What a release wrote is read by the present code, and what the present code writes by it: on bytes that are kept."""

from __future__ import annotations

import base64
import json

import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.message import Message

from tests.releases import RELEASES, ROOT, Release, fill
from thumbwheel.v1 import events_pb2, policy_pb2, preference_pb2, reward_pb2, rollout_pb2

PRESENT = {
    f"thumbwheel.v1.{name}": getattr(module, name)
    for module in (events_pb2, policy_pb2, preference_pb2, reward_pb2, rollout_pb2)
    for name in module.DESCRIPTOR.message_types_by_name
}


def as_json(message: Message) -> dict[str, object]:
    found: dict[str, object] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def held(name: str) -> dict[str, dict[str, object]]:
    """The bytes that are kept of a release: message, bytes, and what they say."""
    lines = (ROOT / "tests" / "golden" / f"{name}.jsonl").read_text().splitlines()
    return {str(one["message"]): one for one in map(json.loads, lines)}


@pytest.mark.parametrize("name", RELEASES)
def test_bytes_that_a_release_wrote_are_read_as_it_meant_them(name: str) -> None:
    kept, release = held(name), Release(name)
    assert kept.keys() == set(release.names), f"python -m tests.golden {name} writes them"
    for full, one in kept.items():
        data = base64.b64decode(str(one["bytes"]))
        message = PRESENT[full].FromString(data)
        assert as_json(message) == one["says"], full
        assert message.SerializeToString(deterministic=True) == data, full  # and not a bit of it is lost


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_reads_what_is_written_now_and_hands_it_on_whole(name: str) -> None:
    release = Release(name)
    for full in release.names:
        new = fill(PRESENT[full]())
        data = new.SerializeToString(deterministic=True)
        old = message_factory.GetMessageClass(release.descriptors[full]).FromString(data)
        assert PRESENT[full].FromString(old.SerializeToString()) == new, full
        for field in release.descriptors[full].fields:
            if field.message_type is None and field.containing_oneof is None:
                assert getattr(old, field.name) == getattr(new, field.name), (full, field.name)


def test_every_release_has_its_bytes() -> None:
    assert {path.stem for path in (ROOT / "tests" / "golden").glob("*.jsonl")} == set(RELEASES)
