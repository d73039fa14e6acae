"""Releases of ourselves, as others still run them: their contracts, out of `proto/golden/`, without their code."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

ROOT = Path(__file__).resolve().parents[1]
RELEASES = sorted(path.stem for path in (ROOT / "proto" / "golden").glob("*.binpb"))


class Release:
    """A release's messages. What it does not know it keeps, as an older process does that hands a message on."""

    def __init__(self, name: str) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "proto" / "golden" / f"{name}.binpb").read_bytes())
        self._pool = descriptor_pool.DescriptorPool()
        self.names: list[str] = []
        for file in files.file:
            self._pool.Add(file)
            if file.package == "thumbwheel.v1":
                self.names += [f"{file.package}.{message.name}" for message in file.message_type]

    @cached_property
    def descriptors(self) -> dict[str, Descriptor]:
        """Its messages by their full names."""
        return {name: self._pool.FindMessageTypeByName(name) for name in self.names}

    def of(self, kind: type[Message]) -> Any:
        """Its class of the same message. Raises `KeyError` where it has none."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(kind.DESCRIPTOR.full_name))

    def convert(self, message: Message) -> Any:
        """What this release makes of a message that another sends."""
        return self.of(type(message)).FromString(message.SerializeToString())


def fill(message: Message, depth: int = 0) -> Message:
    """Sets every field of a message to a value that follows from its number, of each `oneof` the last."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            held = getattr(message, field.name)
            if value.message_type is None:
                held[_value(key)] = _value(value)
            else:
                fill(held[_value(key)], depth + 1)
        elif field.message_type is not None:
            if depth < 4:
                child = getattr(message, field.name)
                fill(child.add() if field.is_repeated else child, depth + 1)
                if not field.is_repeated:
                    child.SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend([_value(field)] * 2)
        else:
            setattr(message, field.name, _value(field))
    return message


def _value(field: Any) -> Any:
    number = field.number
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return {
        FieldDescriptor.CPPTYPE_STRING: b"\x00\xff" if field.type == FieldDescriptor.TYPE_BYTES else f"ä{number}",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_FLOAT: number + 0.5,
        FieldDescriptor.CPPTYPE_DOUBLE: number + 0.25,
    }.get(field.cpp_type, number)
