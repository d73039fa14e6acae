"""One tree of exceptions, for services and clients alike.

    ThumbwheelError
    ├── InvalidArgument      the request is wrong: names the field        INVALID_ARGUMENT
    ├── NotFound             no such thing                                 NOT_FOUND
    ├── Conflict             the key was used with other content           ALREADY_EXISTS
    ├── Unauthenticated      no API key, or none that is known             UNAUTHENTICATED
    ├── PermissionDenied     a receipt or key that does not hold           PERMISSION_DENIED
    ├── FailedPrecondition   not possible now: says what to do             FAILED_PRECONDITION
    │   ├── CorruptCheckpoint    a version that is not what it says
    │   ├── MissingModel         no model where one is expected
    │   ├── PortInUse            another process listens there
    │   └── NoSpace              the disk is full
    ├── ResourceExhausted    too much at once: says when to retry          RESOURCE_EXHAUSTED
    ├── DeadlineExceeded     it took too long                              DEADLINE_EXCEEDED
    ├── Unavailable          safe to retry                                 UNAVAILABLE
    └── Internal             a fault of ours                               INTERNAL

A service raises these; `to_status` and `from_rpc_error` are the one boundary at which they become gRPC statuses with
`google.rpc` details and come back as the same classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "thumbwheel"


class ThumbwheelError(Exception):
    """Base of all errors raised on purpose. `remedy` is the next thing to do, often a command to type."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its arguments, which leaves out those that have a name.
        return _restored, (type(self), vars(self))


def _restored(kind: type[ThumbwheelError], state: dict[str, Any]) -> ThumbwheelError:
    error = kind.__new__(kind, state["message"])
    vars(error).update(state)
    return error


class InvalidArgument(ThumbwheelError):
    """The request is wrong; `field` is the path of the field, such as `sampling.temperature`."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, field: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {super().__str__()}"


class NotFound(ThumbwheelError):
    """There is no such thing."""

    code = grpc.StatusCode.NOT_FOUND


class Conflict(ThumbwheelError):
    """The same key was used before with other content."""

    code = grpc.StatusCode.ALREADY_EXISTS


class Unauthenticated(ThumbwheelError):
    """No API key was given, or it is not known, expired or revoked."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ThumbwheelError):
    """A receipt, signature or key does not hold."""

    code = grpc.StatusCode.PERMISSION_DENIED


class FailedPrecondition(ThumbwheelError):
    """Not possible in the present state; `remedy` says what to do first."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class CorruptCheckpoint(FailedPrecondition):
    """A version is not what its manifest says."""


class MissingModel(FailedPrecondition):
    """There is no model where one is expected."""


class PortInUse(FailedPrecondition):
    """Another process listens there."""


class NoSpace(FailedPrecondition):
    """The disk is full."""


class ResourceExhausted(ThumbwheelError):
    """Too much at once; retry after `retry_after` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after: float, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after = retry_after


class DeadlineExceeded(ThumbwheelError):
    """It took longer than the caller, or a setting, allows."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(ThumbwheelError):
    """The other side is away for the moment; safe to retry."""

    code = grpc.StatusCode.UNAVAILABLE


class Internal(ThumbwheelError):
    """A fault of ours."""


_BY_REASON: dict[str, type[ThumbwheelError]] = {
    c.__name__: c
    for c in (
        NotFound,
        Conflict,
        Unauthenticated,
        PermissionDenied,
        FailedPrecondition,
        CorruptCheckpoint,
        MissingModel,
        PortInUse,
        NoSpace,
        DeadlineExceeded,
        Unavailable,
        Internal,
    )
}
_BY_CODE: dict[grpc.StatusCode, type[ThumbwheelError]] = {
    c.code: c
    for c in (
        NotFound,
        Conflict,
        Unauthenticated,
        PermissionDenied,
        FailedPrecondition,
        DeadlineExceeded,
        Unavailable,
    )
}


def to_status(error: ThumbwheelError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error: its code, its message, and details a program can read."""
    number: int = error.code.value[0]
    status = status_pb2.Status(code=number, message=str(error))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    info.metadata["message"] = error.message
    info.metadata["remedy"] = error.remedy
    status.details.add().Pack(info)
    if isinstance(error, InvalidArgument):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.field, description=error.message)
        status.details.add().Pack(bad)
    elif isinstance(error, ResourceExhausted):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(retry)
    elif isinstance(error, FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(type=type(error).__name__, description=error.remedy or error.message)
        status.details.add().Pack(failure)
    return status


def from_rpc_error(error: grpc.RpcError) -> ThumbwheelError:
    """The typed error that a gRPC status stands for, whoever sent it."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, text = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    info, field, retry = error_details_pb2.ErrorInfo(), "", 0.0
    for detail in status.details if status is not None else ():
        bad, delay = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            continue
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    message, remedy = info.metadata.get("message", "") or text, info.metadata.get("remedy", "")
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument(message, field=field, remedy=remedy)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted(message, retry_after=retry, remedy=remedy)
    if code == grpc.StatusCode.CANCELLED:
        # Never ours: a call that its own side cancels ends in another exception.
        return Unavailable("The server ended the call, as it does when it stops.", remedy="Try again.")
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code)
    if kind is None:
        return Internal(f"{code.name}: {message}")
    return kind(message, remedy=remedy)
