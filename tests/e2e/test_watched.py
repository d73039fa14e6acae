"""A running stack as an operator sees it: its metrics in a real Prometheus, its traces in a receiver, its logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent import futures
from functools import partial
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.monitoring import watched as watching
from tests.monitoring.prometheus import rules
from tests.monitoring.watched import Watched
from tests.support import until
from thumbwheel.client import AsyncClient
from thumbwheel.status import scrape

pytestmark = pytest.mark.timeout(600)


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans in, with the process that sent them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, Span]] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                process = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
                self._spans += [(process, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[tuple[str, Span]]:
        """All that came so far."""
        with self._lock:
            return list(self._spans)


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    """A receiver, and its URL."""
    receiver, server = Receiver(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # no stubs
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def running(receiver: tuple[Receiver, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One stack for all tests of this module, in an event loop of its own."""
    loop = asyncio.new_event_loop()
    folder: Path = tmp_path_factory.mktemp("watched")

    # Entered and left by one task: the stack cancels its owner when a part dies.
    ready: futures.Future[Watched] = futures.Future()
    leave = asyncio.Event()

    async def own() -> None:
        try:
            async with watching.watched(folder, trace_endpoint=receiver[1]) as found:
                ready.set_result(found)
                await leave.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    owner = asyncio.run_coroutine_threadsafe(own(), loop)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield ready.result(500)
    finally:
        loop.call_soon_threadsafe(leave.set)
        owner.result(90)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def test_every_query_of_every_dashboard_brings_data(running: Watched) -> None:
    counts = {name: len(several) for name, several in watching.queries().items()}
    assert counts.keys() == {"wheel", "serving", "feedback", "training", "slo"}
    assert min(counts.values()) >= 10
    assert await watching.without_data(running.prometheus) == []


def test_rules_and_dashboards_ask_for_what_some_process_serves(running: Watched) -> None:
    expressions = [rule["expr"] for rule in rules()]
    expressions += [expression for several in watching.queries().values() for expression in several]
    asked = {
        name for one in expressions for name in re.findall(r"\b(?:thumbwheel|grpc_server|process)_\w+|vllm:\w+", one)
    }
    # That of a certificate is there where the server has one.
    served = watching.names_exported(running.stack) | {"thumbwheel_tls_certificate_expires_timestamp_seconds"}
    assert len(asked) > 40
    assert asked - served == set()


def test_nothing_fires_while_all_is_well(running: Watched) -> None:
    of_the_machine = {"FirstTokenSlow", "CommitsSlow", "DiskFull", "MemoryLow"}  # others may be at work on it
    assert running.prometheus.firing() <= {f"Thumbwheel{name}" for name in of_the_machine}


async def test_clicks_are_seen_to_go_live(running: Watched) -> None:
    live = "sum by (role) (thumbwheel_click_to_live_seconds_count)"
    in_time = 'sum by (role) (thumbwheel_click_to_live_seconds_bucket{le="1800.0"})'

    expected = str(2 * watching.COMPARISONS)

    async def all_of_them() -> bool:
        found = [await asyncio.to_thread(running.prometheus.query, one) for one in (live, in_time)]
        return [{one["metric"]["role"]: one["value"][1] for one in series} for series in found] == 2 * [
            {"policy": expected, "reward": expected}
        ]

    await until(all_of_them, timeout=30, every=0.5)


async def test_scores_are_told_over_the_reference_which_stays_what_it_is(running: Watched) -> None:
    """The policy has gone on, and each prompt is asked of version 0 once."""
    at = running.stack.addresses
    async with AsyncClient(policy=at.reference, reward=at.reward, timeout=60.0) as client:
        assert (await client.policy()).version == "policy-000000"
        first = (await client.score("What is over what?", "This.", "That.")).scores
        again = (await client.score("What is over what?", "This.")).scores
    assert all(one.HasField("score_over_reference") for one in (*first, *again))
    over = [one.score - one.score_over_reference for one in (*first, *again)]
    assert over == pytest.approx([over[0]] * 3, abs=1e-4), "all are over the one response"
    scraped = await asyncio.to_thread(scrape, f"{running.stack.settings.host}:{at.metrics_port('reward')}")
    assert scraped.total("thumbwheel_reward_reference_total", outcome="failed") == 0
    assert scraped.total("thumbwheel_reward_reference_total", outcome="kept") >= 1


def test_labels_are_bounded(running: Watched) -> None:
    """No label takes a user's, a prompt's or a call's id: fifteen values of one, whoever calls."""
    at = running.stack.addresses
    values: dict[tuple[str, str], set[str]] = {}
    for job in at.parts:
        for series in running.prometheus.query(f'{{job="{job}", __name__=~"(thumbwheel|grpc_server)_.+"}}'):
            for label, value in series["metric"].items():
                if label != "le":
                    values.setdefault((series["metric"]["__name__"], label), set()).add(value)
    too_many = {where: found for where, found in values.items() if len(found) > 20}
    assert too_many == {}
    assert not any(re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", value) for found in values.values() for value in found)


async def test_slow_calls_lead_to_their_traces(running: Watched, receiver: tuple[Receiver, str]) -> None:
    """Of a call that Prometheus shows, the spans come; those that could not be sent in time, on a busy machine, do not,
    and so it is asked again with another call.
    """
    metrics = ("thumbwheel_policy_first_token_seconds_bucket", "grpc_server_handling_seconds_bucket")
    async with AsyncClient(policy=running.stack.addresses.policy, timeout=60.0) as client:  # of this event loop

        async def one_is_both(metric: str) -> bool:
            [piece async for piece in client.stream("Where is the trace of this?", sampling=watching.SHORT)]
            found = {one["trace_id"] for one in await asyncio.to_thread(running.prometheus.exemplars, metric)}
            return bool(found & {span.trace_id.hex() for _, span in receiver[0].spans()})

        for metric in metrics:
            await until(partial(one_is_both, metric), timeout=60, every=1.0)


async def test_a_trace_goes_all_the_way_round(running: Watched, receiver: tuple[Receiver, str]) -> None:
    """From the call to its generation's record; from the vote to the version; from the version to its swap."""

    def by_name() -> dict[tuple[str, str], Span]:
        return {(process.removeprefix("thumbwheel-"), span.name): span for process, span in receiver[0].spans()}

    wanted = {
        ("policy", "thumbwheel.v1.PolicyService/GenerateCandidates"),
        ("collector", "collector.ingest"),
        ("collector", "thumbwheel.v1.PreferenceService/SubmitFeedback"),
        ("collector", "collector.publish"),
        ("trainer", "trainer.ingest"),
        ("trainer", "trainer.round"),
        ("trainer", "trainer.publish"),
        ("trainer", "trainer.learnt"),
        ("policy", "version"),
        ("policy", "swap"),
        ("policy", "swap.load"),
        ("reward", "swap"),
    }

    async def all_came() -> bool:
        return wanted <= by_name().keys()

    with contextlib.suppress(TimeoutError):
        await until(all_came, timeout=30, every=0.5)
    assert wanted - by_name().keys() == set()

    def way(process: str, name: str) -> list[str]:
        """The spans above the last of this name, from the inside out."""
        spans = {span.span_id: (process, span) for process, span in receiver[0].spans()}
        at, names = by_name()[process, name], []
        while at.parent_span_id in spans:
            at = spans[at.parent_span_id][1]
            names.append(at.name)
        return names

    submitted = ["thumbwheel.v1.PreferenceService/SubmitFeedback"]
    ways = {
        ("collector", "collector.ingest"): ["thumbwheel.v1.PolicyService"],
        ("trainer", "trainer.ingest"): submitted,
        ("trainer", "trainer.learnt"): submitted,
        ("policy", "swap.load"): ["swap", "version", "trainer.publish", "trainer.round"],
    }

    def found() -> dict[tuple[str, str], list[str]]:
        names = {span: [name.partition("/Generate")[0] for name in way(*span)] for span in ways}
        ingested = names[("collector", "collector.ingest")]
        names[("collector", "collector.ingest")] = ingested[:1]  # the reference is called within a call of Score
        return names

    async def all_the_way() -> bool:  # a process sends its spans every few seconds
        return found() == ways

    with contextlib.suppress(TimeoutError):
        await until(all_the_way, timeout=30, every=0.5)
    assert found() == ways
    spans = {span.span_id: (process, span) for process, span in receiver[0].spans()}
    linked = {
        link.span_id for process, span in receiver[0].spans() for link in span.links if span.name == "trainer.learnt"
    }
    assert {spans[span_id][1].name for span_id in linked} == {"trainer.publish"}


def test_nothing_of_what_users_write_is_in_logs_or_spans(running: Watched, receiver: tuple[Receiver, str]) -> None:
    logs = {path.name: path.read_text() for path in running.logs.glob("*.log")}
    assert {"policy.log", "reward.log", "collector.log", "trainer.log", "broker.log"} <= logs.keys()
    assert [name for name, text in logs.items() if "xyzzy" in text] == []
    assert [span.name for _, span in receiver[0].spans() if "xyzzy" in str(span)] == []
    assert '"message": "serving"' in logs["policy.log"]


def test_logs_are_objects_a_line_each(running: Watched) -> None:
    for path in running.logs.glob("*.log"):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
        if path.stem in running.stack.addresses.parts:
            assert lines, path
            assert all(line.keys() >= {"at", "level", "process", "logger", "message"} for line in lines)
            process = "policy" if path.stem == "reference" else path.stem
            assert {line["process"] for line in lines} == {process}
