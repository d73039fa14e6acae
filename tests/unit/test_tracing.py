"""Traces: across a call, what a span says of a fault, and what is handed on where nothing is traced."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.servers import Running, Service
from thumbwheel import calls, errors, serving, telemetry, tracing
from thumbwheel.client import AsyncClient
from thumbwheel.v1 import policy_pb2 as pb

INCOMING = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


_LAST = (
    "import sys; from thumbwheel import tracing; tracing.start('policy', sys.argv[1])\nwith tracing.span('last'): pass"
)


def _run(*arguments: str) -> str:
    command = [sys.executable, "-c", _LAST, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stderr


async def _ok() -> pb.GenerateResponse:
    return pb.GenerateResponse()


async def test_a_call_is_one_trace_from_the_application_to_the_server(spans: InMemorySpanExporter) -> None:
    service = Service(_ok)
    running = Running(service)
    async with AsyncClient(policy=running.address) as client:
        with tracing.span("application"):
            await client.generate("hi")
            [piece async for piece in client.stream("hi")]
    await running.stop()
    by_name = {(span.name, span.kind): span for span in spans.get_finished_spans()}
    application = by_name["application", SpanKind.INTERNAL]
    asked = by_name["Generate", SpanKind.CLIENT]
    answered = by_name["thumbwheel.v1.PolicyService/Generate", SpanKind.SERVER]
    streamed = by_name["thumbwheel.v1.PolicyService/GenerateStream", SpanKind.SERVER]
    assert asked.parent == application.context
    assert answered.parent is not None
    assert streamed.parent is not None
    assert asked.context is not None
    assert application.context is not None
    assert answered.parent.span_id == asked.context.span_id
    assert streamed.parent.span_id == application.context.span_id
    assert len({span.context.trace_id for span in by_name.values() if span.context}) == 1
    assert answered.attributes == {"rpc.response.status_code": "OK"}


async def test_a_fault_is_told_by_its_class_and_its_status_alone(spans: InMemorySpanExporter) -> None:
    async def answer() -> pb.GenerateResponse:
        raise errors.InvalidArgument("is 'what the user wrote'.", field="prompt")

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address) as client:
        with pytest.raises(errors.InvalidArgument):
            await client.generate("hi")
    await running.stop()
    said = {span.name: (span.status.status_code, span.status.description) for span in spans.get_finished_spans()}
    assert said == {
        "Generate": (StatusCode.ERROR, "InvalidArgument"),
        "thumbwheel.v1.PolicyService/Generate": (StatusCode.ERROR, "INVALID_ARGUMENT"),
    }
    assert [span.events for span in spans.get_finished_spans()] == [(), ()]


async def test_where_nothing_is_traced_the_callers_trace_is_handed_on() -> None:
    seen: list[str] = []

    async def answer() -> pb.GenerateResponse:
        seen.append(tracing.traceparent())
        return pb.GenerateResponse()

    running = Running(Service(answer))
    request = pb.GenerateRequest()
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = channel.unary_unary(
            "/thumbwheel.v1.PolicyService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        for metadata in ((("traceparent", INCOMING),), (("traceparent", "x" * 500),), ()):
            await call(request, metadata=metadata, timeout=10, wait_for_ready=True)
    await running.stop()
    assert seen == [INCOMING, "", ""]


def test_a_record_carries_the_trace_and_gives_it_back(spans: InMemorySpanExporter) -> None:
    assert tracing.headers() == ()
    with tracing.span("publishing", parent=INCOMING):
        headers = (("schema", b"x"), *tracing.headers())
    carried = tracing.of_record(headers)
    assert carried.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert carried.endswith("-01")
    with tracing.span("reading", parent=carried):
        pass
    publishing, reading = spans.get_finished_spans()
    assert reading.parent is not None
    assert publishing.context is not None
    assert reading.parent.span_id == publishing.context.span_id
    assert tracing.of_record([("schema", b"x")]) == tracing.of_record([("traceparent", b"0" * 200)]) == ""


def test_what_is_no_traceparent_begins_a_trace_of_its_own(spans: InMemorySpanExporter) -> None:
    for nonsense in ("garbage", "00-00-00-00", "\ufffd"):
        with tracing.span("reading", parent=nonsense):
            pass
    assert [span.parent for span in spans.get_finished_spans()] == [None, None, None]


def test_a_span_of_the_past_is_recorded_where_its_trace_is_sampled(spans: InMemorySpanExporter) -> None:
    began = time.time() - 10.0
    tracing.record("learnt", parent=INCOMING, began=began, links=[INCOMING, "garbage"], version="policy-000001")
    tracing.record("learnt", parent=UNSAMPLED, began=began)
    tracing.record("learnt", parent="", began=began)
    [span] = spans.get_finished_spans()
    assert span.start_time == int(began * 1e9)
    assert span.attributes == {"version": "policy-000001"}
    assert [format(link.context.span_id, "016x") for link in span.links] == ["b7ad6b7169203331"]


def test_links_are_bounded(spans: InMemorySpanExporter) -> None:
    with tracing.span("round", links=[INCOMING] * 500):
        pass
    assert len(spans.get_finished_spans()[0].links) == tracing.MAX_LINKS


def test_an_observation_is_tied_to_a_trace_that_is_sampled(spans: InMemorySpanExporter) -> None:
    assert tracing.exemplar() is None
    with tracing.span("call", parent=UNSAMPLED):
        assert tracing.exemplar() is None
    with tracing.span("call", parent=INCOMING):
        assert tracing.exemplar() == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}


def test_a_line_of_the_log_names_tenant_and_trace(spans: InMemorySpanExporter) -> None:
    formatter = telemetry.JsonFormatter("policy")
    record = logging.LogRecord("x", logging.INFO, "", 0, "hello %s", ("there",), None)

    async def within_a_call() -> str:
        calls.enter(calls.Caller("acme"), None)
        with tracing.span("call", parent=INCOMING):
            return formatter.format(record)

    line = json.loads(asyncio.run(within_a_call()))
    assert (line["tenant"], line["trace_id"]) == ("acme", "0af7651916cd43dd8448eb211c80319c")
    assert line["message"] == "hello there"
    outside = json.loads(formatter.format(record))
    assert outside.keys() == {"at", "level", "process", "logger", "message"}


async def test_the_time_of_a_call_is_tied_to_its_trace(spans: InMemorySpanExporter) -> None:
    running = Running(Service(_ok))
    async with AsyncClient(policy=running.address) as client:
        with tracing.span("application", parent=INCOMING):
            await client.generate("hi")
    await running.stop()
    method = {"grpc_service": "thumbwheel.v1.PolicyService", "grpc_method": "Generate"}
    [metric] = serving.HANDLING.collect()
    tied = [s.exemplar.labels for s in metric.samples if s.exemplar and method.items() <= s.labels.items()]
    assert {"trace_id": "0af7651916cd43dd8448eb211c80319c"} in tied


class _Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.process = ""
        self.came = threading.Event()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.process = attributes["service.name"]
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        self.came.set()
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_arrive_at_the_endpoint_also_those_of_the_last_moment() -> None:
    receiver = _Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # no stubs
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _run(f"http://127.0.0.1:{port}")
    assert receiver.came.wait(10)
    server.stop(0).wait()
    assert (receiver.process, receiver.names) == ("thumbwheel-policy", ["last"])


def test_an_endpoint_that_is_away_costs_spans_and_nothing_else() -> None:
    began = time.monotonic()
    _run("http://127.0.0.1:1")
    assert time.monotonic() - began < 30.0
