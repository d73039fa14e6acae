"""The hook through which everything passes that leaves the collector: texts of a tenant that asks for it are redacted.

Token ids would say what the text no longer says: where a text changes, they go with it, and the trainer makes tokens of
the text that is left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from google.protobuf.message import Message

from services.collector.rights import pii
from services.collector.rights.tenants import Tenants
from thumbwheel import errors
from thumbwheel.v1.events_pb2 import ComparedResponse, ComparisonEvent, DeadLetter, FeedbackEvent, ThumbEvent
from thumbwheel.v1.policy_pb2 import Prompt

Redact = Callable[[str], str]

BUILTIN = "builtin"
_TEXTS = ("text", "content")
_TYPES: dict[str, type[FeedbackEvent | ComparisonEvent | ThumbEvent | DeadLetter]] = {
    kind.DESCRIPTOR.full_name: kind for kind in (FeedbackEvent, ComparisonEvent, ThumbEvent, DeadLetter)
}


class Redaction:
    """The redactors of all tenants. Raises `errors.FailedPrecondition` for one that cannot be imported."""

    def __init__(self, tenants: Tenants) -> None:
        self._default = load(tenants.defaults.redact)
        self._named = {tenant: load(rules.redact) for tenant, rules in tenants.named.items()}
        self._on = any(redact is not None for redact in (self._default, *self._named.values()))

    def of(self, tenant: str) -> Redact | None:
        """The redactor of a tenant; None where it asks for none."""
        return self._named.get(tenant, self._default)

    def outgoing(self, schema: str, value: bytes) -> bytes:
        """An event as it may leave, serialised as it came in.

        Raises `errors.InvalidArgument` for one that cannot be redacted: it must not leave at all.
        """
        if not self._on or schema not in _TYPES:
            return value
        message = _TYPES[schema].FromString(value)
        if isinstance(message, DeadLetter):
            # Nobody could read it, so nobody knows whose it is.
            message.ClearField("value")
            return message.SerializeToString()
        redact = self.of(message.record.tenant if isinstance(message, FeedbackEvent) else message.tenant)
        if redact is None or not redact_message(message, redact):
            return value
        return message.SerializeToString()


def load(name: str) -> Redact | None:
    """The function that a setting names. Raises `errors.FailedPrecondition`."""
    if not name:
        return None
    if name == BUILTIN:
        return pii.redact
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise errors.FailedPrecondition(
            f"redact = {name!r} cannot be imported: {error}.",
            remedy='Name a function as "module:function", found on PYTHONPATH, or "builtin".',
        ) from error
    if not callable(found):
        raise errors.FailedPrecondition(f"redact = {name!r} is no function.", remedy='Use "module:function".')

    def checked(text: str) -> str:
        try:
            redacted = found(text)
        except Exception as error:  # whatever a tenant's function raises, its text must not leave
            raise errors.InvalidArgument(f"{name} raised {type(error).__name__}.", field="redact") from error
        if not isinstance(redacted, str):
            raise errors.InvalidArgument(f"{name} returned no text.", field="redact")
        return redacted

    return checked


def redact_message(message: Message, redact: Redact) -> bool:
    """Redacts every text in a message, in place; true where that changed anything.

    Raises `errors.InvalidArgument` for a prompt that is given as token ids: there is no text to look at.
    """
    if isinstance(message, Prompt) and message.WhichOneof("content") == "tokens":
        raise errors.InvalidArgument("is token ids, which cannot be redacted.", field="prompt.tokens")
    changed = False
    for field, value in message.ListFields():
        if field.message_type is not None:
            parts = value if field.is_repeated else (value,)
            changed_here = [redact_message(part, redact) for part in parts]
            if any(changed_here):
                changed = True
                if isinstance(value, Prompt) and "prompt_token_ids" in message.DESCRIPTOR.fields_by_name:
                    message.ClearField("prompt_token_ids")
        elif field.name in _TEXTS and (redacted := redact(value)) != value:
            setattr(message, field.name, redacted)
            changed = True
    if changed and isinstance(message, ComparedResponse):
        message.ClearField("token_ids")
        message.ClearField("logprobs")
        message.ClearField("spans")
    return changed
