"""What is submitted, checked before anything is written: each fault is refused by the name of its field."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from services.collector.rights.tenants import Tenants
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.v1.policy_pb2 import Receipt, ReceiptClaims
from thumbwheel.v1.preference_pb2 import (
    AspectPreference,
    AspectThumb,
    Comparison,
    Feedback,
    ImplicitKind,
    ImplicitSignal,
    Preference,
    ThumbValue,
)

MAX_ID_CHARACTERS = 128
MAX_ASPECT_CHARACTERS = 64
MAX_ASPECTS = 16
MAX_DWELL_SECONDS = 86_400.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NONE = Receipt()


@dataclass(frozen=True, slots=True)
class Submission:
    """Feedback that was found well-formed, and what its receipts attest, in the order of display."""

    tenant: str
    feedback: Feedback
    body: bytes
    """The feedback, serialised deterministically."""

    body_sha256: bytes
    """Tells a repeated submission from another one with the same key."""

    kind: str
    claims: tuple[ReceiptClaims, ...]
    consent: bool
    """Whether it may be learnt from."""

    @property
    def prompt_id(self) -> str:
        """The prompt that it is about."""
        return self.claims[0].prompt_id


@dataclass(frozen=True, slots=True)
class Checker:
    """Checks submissions of one deployment."""

    receipts: ReceiptKey
    max_text_bytes: int
    tenants: Tenants = field(default_factory=Tenants)

    def check(self, feedback: Feedback, *, tenant: str) -> Submission:
        """The submission. Raises `errors.InvalidArgument` and `errors.PermissionDenied`, naming the field."""
        check_id(feedback.idempotency_key, "feedback.idempotency_key")
        check_id(feedback.user_id, "feedback.user_id")
        if feedback.guidelines_version:
            check_id(feedback.guidelines_version, "feedback.guidelines_version")
        if feedback.HasField("given_at"):
            _check_time(feedback.given_at, "feedback.given_at")
        kind = feedback.WhichOneof("kind")
        match kind:
            case "comparison":
                _check_comparison(feedback.comparison)
            case "thumb":
                _check_enum(feedback.thumb.value, ThumbValue, "feedback.thumb.value")
                _check_aspects(feedback.thumb.aspects, "feedback.thumb.aspects")
            case "edit":
                self._check_text(feedback.edit.text, "feedback.edit.text")
            case "comment":
                self._check_text(feedback.comment.text, "feedback.comment.text")
            case "implicit":
                _check_implicit(feedback.implicit)
            case None:
                raise errors.InvalidArgument(
                    "is missing.", field="feedback.kind", remedy="Set comparison, thumb, edit, comment or implicit."
                )
        claims = tuple(self._verified(receipt, field, tenant) for field, receipt in receipts_of(feedback))
        if kind == "comparison":
            _check_pair(*claims)
        elif kind == "edit" and hashlib.sha256(feedback.edit.text.encode()).digest() == claims[0].response_sha256:
            raise errors.InvalidArgument(
                "is the response as it was.",
                field="feedback.edit.text",
                remedy="Send the text as changed, or a thumb where it was good.",
            )
        body = feedback.SerializeToString(deterministic=True)
        consent = self.tenants[tenant].consents(feedback.consent if feedback.HasField("consent") else None)
        return Submission(tenant, feedback, body, hashlib.sha256(body).digest(), kind, claims, consent)

    def _verified(self, receipt: Receipt, field: str, tenant: str) -> ReceiptClaims:
        if receipt == _NONE:
            raise errors.InvalidArgument(
                "is missing.", field=field, remedy="Hand back the receipt that came with the response."
            )
        claims = self.receipts.verify(receipt, field=field)
        if claims.tenant != tenant:
            raise errors.PermissionDenied(
                f"{field}: is not a receipt of tenant {tenant!r}.",
                remedy="Send it as the tenant that asked for the response.",
            )
        if not claims.generation_id or not claims.prompt_id:
            raise errors.InvalidArgument("names no generation or no prompt.", field=f"{field}.claims")
        return claims

    def _check_text(self, text: str, field: str) -> None:
        if not text.strip():
            raise errors.InvalidArgument("is empty.", field=field, remedy="Send at least one visible character.")
        size = len(text.encode())
        if size > self.max_text_bytes:
            raise errors.InvalidArgument(
                f"has {size} bytes of UTF-8; the most is {self.max_text_bytes}.", field=field, remedy="Shorten it."
            )


def receipts_of(feedback: Feedback) -> list[tuple[str, Receipt]]:
    """The receipts in a piece of feedback, in the order of display, each with the path of its field."""
    match feedback.WhichOneof("kind"):
        case "comparison":
            pair = feedback.comparison
            return [("feedback.comparison.a", pair.a), ("feedback.comparison.b", pair.b)]
        case "thumb":
            return [("feedback.thumb.receipt", feedback.thumb.receipt)]
        case "edit":
            return [("feedback.edit.receipt", feedback.edit.receipt)]
        case "comment":
            return [("feedback.comment.receipt", feedback.comment.receipt)]
        case "implicit":
            return [("feedback.implicit.receipt", feedback.implicit.receipt)]
        case None:
            return []


def check_id(value: str, field: str) -> None:
    """Refuses what is empty, longer than 128 characters, or holds control characters (no database orders those)."""
    if not value:
        raise errors.InvalidArgument("is empty.", field=field, remedy=f"Send 1 to {MAX_ID_CHARACTERS} characters.")
    if len(value) > MAX_ID_CHARACTERS:
        raise errors.InvalidArgument(
            f"has {len(value)} characters.", field=field, remedy=f"Send 1 to {MAX_ID_CHARACTERS}."
        )
    if _CONTROL.search(value):
        raise errors.InvalidArgument("holds control characters.", field=field, remedy="Leave them out.")


def _check_comparison(comparison: Comparison) -> None:
    path = "feedback.comparison"
    _check_enum(comparison.preference, Preference, f"{path}.preference")
    if comparison.HasField("strength"):
        _check_range(comparison.strength, f"{path}.strength", low=0.0, high=1.0)
    if comparison.HasField("propensity"):
        _check_range(comparison.propensity, f"{path}.propensity", low=0.0, high=1.0, above=True)
    _check_aspects(comparison.aspects, f"{path}.aspects")


def _check_pair(a: ReceiptClaims, b: ReceiptClaims) -> None:
    fault = ""
    if a.generation_id == b.generation_id:
        fault = "is the same response as feedback.comparison.a."
    elif a.prompt_sha256 != b.prompt_sha256 or (not a.prompt_sha256 and a.prompt_id != b.prompt_id):
        fault = "answers another prompt than feedback.comparison.a does."
    if fault:
        remedy = "Compare two responses to one prompt, such as two candidates of one request."
        raise errors.InvalidArgument(fault, field="feedback.comparison.b", remedy=remedy)


def _check_implicit(signal: ImplicitSignal) -> None:
    path = "feedback.implicit"
    _check_enum(signal.kind, ImplicitKind, f"{path}.kind")
    dwelled = signal.kind == ImplicitKind.IMPLICIT_KIND_DWELLED
    if dwelled != signal.HasField("seconds"):
        raise errors.InvalidArgument(
            "is missing." if dwelled else "belongs to IMPLICIT_KIND_DWELLED only.",
            field=f"{path}.seconds",
            remedy="Say how long the user stayed." if dwelled else "Leave it out.",
        )
    if dwelled:
        _check_range(signal.seconds, f"{path}.seconds", low=0.0, high=MAX_DWELL_SECONDS)


def _check_enum(value: int, enum: type[Preference] | type[ThumbValue] | type[ImplicitKind], field: str) -> None:
    if value == 0 or value not in _values(enum):
        names = ", ".join(name for name, number in enum.items() if number != 0)
        raise errors.InvalidArgument(
            "is missing." if value == 0 else f"is {value}, which means nothing.", field=field, remedy=f"Send {names}."
        )


@functools.cache
def _values(enum: type[Preference] | type[ThumbValue] | type[ImplicitKind]) -> frozenset[int]:
    return frozenset(enum.values())


def _check_range(value: float, field: str, *, low: float, high: float, above: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        what = f"above {low:g} and at most {high:g}" if above else f"{low:g} to {high:g}"
        raise errors.InvalidArgument(f"is {value:g}.", field=field, remedy=f"Send {what}.")


def _check_aspects(aspects: Iterable[AspectPreference | AspectThumb], field: str) -> None:
    seen: set[str] = set()
    for i, aspect in enumerate(aspects):
        name = aspect.aspect
        if i >= MAX_ASPECTS:
            raise errors.InvalidArgument(f"holds more than {MAX_ASPECTS}.", field=field, remedy="Send fewer.")
        if not name.strip() or len(name) > MAX_ASPECT_CHARACTERS:
            raise errors.InvalidArgument(
                "is empty or too long.",
                field=f"{field}[{i}].aspect",
                remedy=f"Send 1 to {MAX_ASPECT_CHARACTERS} characters, such as helpfulness.",
            )
        if name in seen:
            raise errors.InvalidArgument(
                f"names {name!r} a second time.", field=f"{field}[{i}].aspect", remedy="Judge each aspect once."
            )
        seen.add(name)
        if isinstance(aspect, AspectThumb):
            _check_enum(aspect.value, ThumbValue, f"{field}[{i}].value")
        else:
            _check_enum(aspect.preference, Preference, f"{field}[{i}].preference")


def _check_time(time: Timestamp, field: str) -> None:
    try:
        time.ToDatetime()
    except (ValueError, OverflowError) as error:
        raise errors.InvalidArgument(
            f"is no time: {error}.", field=field, remedy="Send a google.protobuf.Timestamp, or leave it out."
        ) from error
    if not 0 <= time.nanos < 1_000_000_000:
        raise errors.InvalidArgument(
            f"has {time.nanos} nanoseconds.", field=f"{field}.nanos", remedy="Send 0 to 999999999."
        )
