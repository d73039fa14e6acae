"""Traces: what one call, one click and one version went through, across processes and Kafka.

    application ─▶ policy ─▶ Kafka ─▶ collector              the generation
    application ─▶ collector ─▶ outbox ─▶ Kafka ─▶ trainer   the click; ends with the version that learnt from it
                                        trainer ─▶ Kafka ─▶ policy, reward: the swap      the version

Off unless `--trace-endpoint` names an OpenTelemetry collector. The W3C `traceparent` that a call or a record carries is
handed on even then, so one process without traces leaves no hole. Spans carry ids, names, counts and times, and never
what a user wrote: exceptions are recorded by their class alone.

How many calls are traced is the SDK's own setting: OTEL_TRACES_SAMPLER=parentbased_traceidratio and
OTEL_TRACES_SAMPLER_ARG=0.01 trace one call in a hundred.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

TRACEPARENT = "traceparent"
MAX_TRACEPARENT = 128
"""Longest header that is taken over; the one of today has 55 characters."""

MAX_LINKS = 128

_EXPORT_SECONDS = 5
_PROPAGATOR = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("thumbwheel")


def start(process: str, endpoint: str) -> None:
    """Sends this process's spans to `endpoint`, a URL of OTLP over gRPC, from a thread of its own; "" sends none.

    An endpoint that is away costs spans and nothing else.
    """
    if not endpoint:
        return
    from importlib.metadata import version

    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"thumbwheel-{process}", "service.version": version("thumbwheel")})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    atexit.register(provider.shutdown)


@contextmanager
def span(
    name: str,
    *,
    parent: str | bytes = "",
    kind: SpanKind = SpanKind.INTERNAL,
    links: Iterable[str] = (),
    **attributes: AttributeValue,
) -> Iterator[Span]:
    """The time that the body takes, within the current span, or within `parent`, a traceparent, where one is given.

    `links` are traceparents of what this is also about; the first `MAX_LINKS` are kept.
    """
    within = _context(parent) if parent else None
    linked = [Link(one) for one in map(_span_context, links) if one.is_valid][:MAX_LINKS]
    with _tracer.start_as_current_span(
        name,
        within,
        kind,
        attributes=attributes,
        links=linked,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def record(name: str, *, parent: str, began: float, links: Iterable[str] = (), **attributes: AttributeValue) -> None:
    """A span that began at `began`, in seconds since the epoch, and ends now. Nothing where `parent` is not sampled."""
    within = _span_context(parent)
    if not within.trace_flags.sampled:
        return
    linked = [Link(one) for one in map(_span_context, links) if one.is_valid]
    _tracer.start_span(name, _context(parent), SpanKind.CONSUMER, attributes, linked, start_time=int(began * 1e9)).end()


def begin_call(method: str, incoming: str) -> Span | None:
    """The server's span of a call, current for the rest of this task; to be ended by `end_call`.

    `incoming` is the caller's traceparent, "" where it has none. None where there is nothing to trace or to hand on.
    """
    within = _context(incoming) if incoming else None
    opened = _tracer.start_span(method.lstrip("/"), within, SpanKind.SERVER)
    if not opened.get_span_context().is_valid:
        return None
    otel.attach(trace.set_span_in_context(opened))
    return opened


def end_call(opened: Span, code: str) -> None:
    """Ends the span of a call with the name of its status."""
    if opened.is_recording():
        opened.set_attribute("rpc.response.status_code", code)
        if code not in ("OK", "CANCELLED"):
            opened.set_status(Status(StatusCode.ERROR, code))
    opened.end()


def traceparent() -> str:
    """The current span, as calls and records carry it; "" where there is none."""
    if not trace.get_current_span().get_span_context().is_valid:
        return ""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def headers() -> tuple[tuple[str, bytes], ...]:
    """What a record on the stream carries of the current span; nothing where there is none."""
    return as_headers(traceparent())


def as_headers(carried: str) -> tuple[tuple[str, bytes], ...]:
    """A traceparent as a record on the stream carries it; nothing for ""."""
    return ((TRACEPARENT, carried.encode()),) if carried else ()


def of_record(found: Iterable[tuple[str, bytes]]) -> str:
    """The traceparent among the headers of a record; "" where there is none that could be one."""
    for key, value in found:
        if key == TRACEPARENT and len(value) <= MAX_TRACEPARENT:
            return value.decode("ascii", errors="replace")
    return ""


def of_metadata(found: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The traceparent among the metadata of a call; "" where there is none that could be one."""
    for key, value in found or ():
        if key == TRACEPARENT and isinstance(value, str) and len(value) <= MAX_TRACEPARENT:
            return value
    return ""


def outgoing() -> tuple[tuple[str, str], ...]:
    """What a call carries of the current span, as metadata; nothing where there is none."""
    carried = traceparent()
    return ((TRACEPARENT, carried),) if carried else ()


def trace_id() -> str:
    """The id of the current trace in 32 hexadecimal digits, where it is sampled; "" elsewhere."""
    current = trace.get_current_span().get_span_context()
    return format(current.trace_id, "032x") if current.trace_flags.sampled else ""


def exemplar() -> dict[str, str] | None:
    """What ties an observation to its trace, for Prometheus; None where nothing is traced."""
    found = trace_id()
    return {"trace_id": found} if found else None


def _context(carried: str | bytes) -> otel.Context:
    text = carried.decode("ascii", errors="replace") if isinstance(carried, bytes) else carried
    return _PROPAGATOR.extract({TRACEPARENT: text}, otel.Context())


def _span_context(carried: str) -> trace.SpanContext:
    return trace.get_current_span(_context(carried)).get_span_context()
