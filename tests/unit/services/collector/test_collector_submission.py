"""Every kind of bad submission is refused by the name of its field."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from services.collector.submission import Checker
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import Receipt, ReceiptClaims
from thumbwheel.v1.preference_pb2 import (
    AspectPreference,
    AspectThumb,
    Feedback,
    ImplicitKind,
    ImplicitSignal,
    Preference,
    ThumbValue,
)

MAX_TEXT_BYTES = 100


@pytest.fixture
def checker(deployment: Deployment) -> Checker:
    return Checker(deployment.key, MAX_TEXT_BYTES)


@pytest.fixture
def valid(deployment: Deployment) -> dict[str, Feedback]:
    a, b = deployment.pair()
    implicit = ImplicitSignal(receipt=a.generation.receipt, kind=ImplicitKind.IMPLICIT_KIND_DWELLED, seconds=2.5)
    return {
        "comparison": parts.comparison(a, b),
        "thumb": parts.thumb(a),
        "edit": parts.edit(a, "Paris, on the Seine."),
        "comment": parts.comment(a, "Too short."),
        "implicit": Feedback(idempotency_key="k", user_id="ann", implicit=implicit),
    }


@pytest.mark.parametrize("kind", ["comparison", "thumb", "edit", "comment", "implicit"])
def test_every_kind_is_taken(checker: Checker, valid: dict[str, Feedback], kind: str) -> None:
    submission = checker.check(valid[kind], tenant="default")
    assert submission.kind == kind
    assert len(submission.claims) == (2 if kind == "comparison" else 1)
    assert submission.prompt_id == submission.claims[0].prompt_id


def _aspect(name: str, preference: int = Preference.PREFERENCE_A) -> AspectPreference:
    aspect = AspectPreference(aspect=name)
    aspect.preference = preference  # type: ignore[assignment]  # any number can come over the wire
    return aspect


Change = Callable[[Feedback], object]
BAD: list[tuple[str, Change, str]] = [
    ("comparison", lambda f: f.ClearField("idempotency_key"), "feedback.idempotency_key"),
    ("comparison", lambda f: setattr(f, "idempotency_key", "k" * 129), "feedback.idempotency_key"),
    ("comparison", lambda f: setattr(f, "idempotency_key", "a\0b"), "feedback.idempotency_key"),
    ("comparison", lambda f: f.ClearField("user_id"), "feedback.user_id"),
    ("comparison", lambda f: setattr(f, "user_id", "u" * 129), "feedback.user_id"),
    ("comparison", lambda f: setattr(f, "guidelines_version", "g" * 129), "feedback.guidelines_version"),
    ("comparison", lambda f: f.given_at.CopyFrom(Timestamp(seconds=10**15)), "feedback.given_at"),
    ("comparison", lambda f: f.given_at.CopyFrom(Timestamp(nanos=-5)), "feedback.given_at"),
    ("comparison", lambda f: f.ClearField("comparison"), "feedback.kind"),
    ("comparison", lambda f: f.comparison.ClearField("preference"), "feedback.comparison.preference"),
    ("comparison", lambda f: setattr(f.comparison, "preference", 99), "feedback.comparison.preference"),
    ("comparison", lambda f: setattr(f.comparison, "strength", 1.01), "feedback.comparison.strength"),
    ("comparison", lambda f: setattr(f.comparison, "strength", -0.01), "feedback.comparison.strength"),
    ("comparison", lambda f: setattr(f.comparison, "strength", math.nan), "feedback.comparison.strength"),
    ("comparison", lambda f: setattr(f.comparison, "propensity", 0.0), "feedback.comparison.propensity"),
    ("comparison", lambda f: setattr(f.comparison, "propensity", math.inf), "feedback.comparison.propensity"),
    ("comparison", lambda f: f.comparison.aspects.append(_aspect("")), "feedback.comparison.aspects[0].aspect"),
    ("comparison", lambda f: f.comparison.aspects.append(_aspect("x" * 65)), "feedback.comparison.aspects[0].aspect"),
    (
        "comparison",
        lambda f: f.comparison.aspects.extend([_aspect("fluency"), _aspect("fluency")]),
        "feedback.comparison.aspects[1].aspect",
    ),
    (
        "comparison",
        lambda f: f.comparison.aspects.append(_aspect("fluency", 0)),
        "feedback.comparison.aspects[0].preference",
    ),
    (
        "comparison",
        lambda f: f.comparison.aspects.extend(_aspect(str(i)) for i in range(17)),
        "feedback.comparison.aspects",
    ),
    ("comparison", lambda f: f.comparison.ClearField("a"), "feedback.comparison.a"),
    ("comparison", lambda f: f.comparison.b.CopyFrom(Receipt()), "feedback.comparison.b"),
    ("comparison", lambda f: f.comparison.b.CopyFrom(f.comparison.a), "feedback.comparison.b"),
    ("comparison", lambda f: f.comparison.b.ClearField("signature"), "feedback.comparison.b.signature"),
    ("thumb", lambda f: f.thumb.ClearField("value"), "feedback.thumb.value"),
    ("thumb", lambda f: f.thumb.ClearField("receipt"), "feedback.thumb.receipt"),
    (
        "thumb",
        lambda f: f.thumb.aspects.append(AspectThumb(aspect="fluency")),
        "feedback.thumb.aspects[0].value",
    ),
    ("edit", lambda f: setattr(f.edit, "text", " \n"), "feedback.edit.text"),
    ("edit", lambda f: setattr(f.edit, "text", "é" * (MAX_TEXT_BYTES // 2 + 1)), "feedback.edit.text"),
    ("edit", lambda f: setattr(f.edit, "text", "Paris."), "feedback.edit.text"),
    ("edit", lambda f: f.edit.ClearField("receipt"), "feedback.edit.receipt"),
    ("comment", lambda f: f.comment.ClearField("text"), "feedback.comment.text"),
    ("comment", lambda f: setattr(f.comment, "text", "x" * (MAX_TEXT_BYTES + 1)), "feedback.comment.text"),
    ("implicit", lambda f: f.implicit.ClearField("kind"), "feedback.implicit.kind"),
    ("implicit", lambda f: f.implicit.ClearField("seconds"), "feedback.implicit.seconds"),
    ("implicit", lambda f: setattr(f.implicit, "seconds", -1.0), "feedback.implicit.seconds"),
    (
        "implicit",
        lambda f: setattr(f.implicit, "kind", ImplicitKind.IMPLICIT_KIND_COPIED),
        "feedback.implicit.seconds",
    ),
]


@pytest.mark.parametrize(("kind", "change", "field"), BAD, ids=[f"{i}-{case[2]}" for i, case in enumerate(BAD)])
def test_bad_input_is_refused_by_its_field(
    checker: Checker, valid: dict[str, Feedback], kind: str, change: Change, field: str
) -> None:
    feedback = valid[kind]
    change(feedback)
    with pytest.raises(errors.InvalidArgument) as raised:
        checker.check(feedback, tenant="default")
    assert raised.value.field == field
    assert raised.value.message


def test_receipts_of_two_prompts_are_refused(checker: Checker, deployment: Deployment) -> None:
    feedback = parts.comparison(deployment.generation("a"), deployment.generation("b"))
    with pytest.raises(errors.InvalidArgument, match="another prompt") as raised:
        checker.check(feedback, tenant="default")
    assert raised.value.field == "feedback.comparison.b"


def test_an_altered_receipt_is_refused(checker: Checker, valid: dict[str, Feedback]) -> None:
    feedback = valid["comparison"]
    claims = ReceiptClaims.FromString(feedback.comparison.b.claims)
    claims.version = "policy-999999"
    feedback.comparison.b.claims = claims.SerializeToString()
    with pytest.raises(errors.PermissionDenied, match=r"feedback\.comparison\.b"):
        checker.check(feedback, tenant="default")


def test_a_receipt_of_another_deployment_is_refused(
    checker: Checker, deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    forger = Deployment.at(tmp_path_factory.mktemp("forger"))
    with pytest.raises(errors.PermissionDenied, match=r"feedback\.thumb\.receipt"):
        checker.check(parts.thumb(forger.generation()), tenant="default")


def test_a_receipt_of_another_tenant_is_refused(checker: Checker, deployment: Deployment) -> None:
    other = Deployment(deployment.key, tenant="other")
    feedback = parts.thumb(other.generation())
    assert checker.check(feedback, tenant="other").tenant == "other"
    with pytest.raises(errors.PermissionDenied, match=r"feedback\.thumb\.receipt.*'default'"):
        checker.check(feedback, tenant="default")


def test_the_body_tells_content_from_content(checker: Checker, valid: dict[str, Feedback]) -> None:
    feedback = valid["thumb"]
    first = checker.check(feedback, tenant="default").body_sha256
    assert checker.check(Feedback.FromString(feedback.SerializeToString()), tenant="default").body_sha256 == first
    feedback.thumb.value = ThumbValue.THUMB_VALUE_DOWN
    assert checker.check(feedback, tenant="default").body_sha256 != first
