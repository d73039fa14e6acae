"""`make bench-observability`: what metrics and traces cost those who are being served.

    metrics_on   tokens a second with metrics, scraped every second ÷ with none
    traces_on    tokens a second with metrics, and every call traced ÷ with metrics alone

A policy service of its own process with a real engine and a stream of clients; what is compared are slices of a few
seconds, in turns, of the same process (see `observability_server`). The model is tiny and random by default: its engine
takes the least, so what surrounds it weighs the most. `--model` names another.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent import futures
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bench import harness
from bench.serving_processes import broker_with_topics
from tests.support import free_port, make_tiny_llama
from thumbwheel import errors
from thumbwheel.auth import ManifestSigner, ManifestVerifier, create_keys
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.client import AsyncClient
from thumbwheel.v1.policy_pb2 import SamplingParams

MODES = ("bare", "metrics", "traces")
CLIENTS = 16
PARAMS = SamplingParams(max_tokens=32, ignore_eos=True)
_READY_SECONDS = 240.0
_CUT_SECONDS = 0.5  # of a slice, at its beginning: calls of the slice before are still going on


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and counts them."""

    def __init__(self) -> None:
        self.spans = 0

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


class Service:
    """The service, in the process of its own."""

    def __init__(self, home: Path, servers: str, endpoint: str) -> None:
        self.address, self.metrics_port = f"127.0.0.1:{free_port()}", free_port()
        command = [sys.executable, "-m", "bench.observability_server", "--home", str(home)]
        command += ["--bootstrap-servers", servers, "--listen", self.address, "--metrics-port", str(self.metrics_port)]
        command += ["--trace-endpoint", endpoint, "--max-model-len", "512", "--log-level", "warning"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )

    def to(self, mode: str) -> None:
        """Switches it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(mode, file=self._process.stdin, flush=True)
        # vLLM may print lines of its own.
        while (line := self._process.stdout.readline()) != "done\n":
            if not line:
                raise RuntimeError(f"the service ended with status {self._process.wait(10)}")

    def scrape(self) -> None:
        """As Prometheus would."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            answer.read()

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Load:
    """Clients that ask one thing after the other, half of them for streams, and count the tokens that come."""

    def __init__(self, address: str) -> None:
        self.tokens = 0
        self._client = AsyncClient(policy=address, timeout=120.0, connections=2)

    async def run(self) -> None:
        """For ever."""
        async with self._client, asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._one(number))

    async def ready(self) -> None:
        """Waits until the service answers."""
        async with asyncio.timeout(_READY_SECONDS):
            while True:
                try:
                    await self._client.policy()
                    return
                except errors.ThumbwheelError:
                    await asyncio.sleep(0.5)

    async def _one(self, number: int) -> None:
        for turn in itertools.count():
            asked = f"{number} asks for the {turn}th time"
            if number % 2:
                async for piece in self._client.stream(asked, sampling=PARAMS):
                    self.tokens += len(piece.token_ids) if not hasattr(piece, "receipt") else 0
            else:
                self.tokens += len((await self._client.generate(asked, sampling=PARAMS)).token_ids)


async def measure(service: Service, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Tokens a second of each mode, by round; the modes take turns, and which is first goes round as well."""
    load = Load(service.address)
    await load.ready()
    running = asyncio.create_task(load.run())
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    await asyncio.sleep(5.0)  # until it is warm
    for number in range(rounds):
        turn = number % len(MODES)
        order = (*MODES[turn:], *MODES[:turn])
        for mode in order if number % 2 else order[::-1]:
            harness.progress(f"round {number + 1} of {rounds}: {mode}", number / rounds)
            await asyncio.to_thread(service.to, mode)
            await asyncio.sleep(_CUT_SECONDS)
            began, before = time.perf_counter(), load.tokens
            while (left := began + seconds - time.perf_counter()) > 0:
                await asyncio.sleep(min(1.0, left))
                if mode != "bare":
                    await asyncio.to_thread(service.scrape)
            found[mode].append((load.tokens - before) / (time.perf_counter() - began))
    harness.progress("", 1.0)
    assert not running.done(), running.exception()
    running.cancel()
    await asyncio.wait([running])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="make bench-observability", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a slice")
    parser.add_argument("--model", default=None, help="a folder or a Hugging Face id; a tiny random one where left out")
    given = parser.parse_args()
    from trainer import base, publish, runtime

    runtime.before_imports()
    runtime.quiet_transformers()
    receiver, server = Receiver(), grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # no stubs
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with tempfile.TemporaryDirectory(prefix="thumbwheel-observability-") as name:
        home = Path(name)
        model = base.fetch(given.model) if given.model else make_tiny_llama(home / "tiny", seed=0)
        create_keys(home / "keys")
        store = LocalStore(home / "store", ManifestVerifier.load(home / "keys"))
        publish.ensure_base(model, store, ManifestSigner.load(home / "keys"))
        with broker_with_topics(home) as broker:
            service = Service(home, broker.bootstrap_servers, f"http://127.0.0.1:{port}")
            try:
                found = asyncio.run(measure(service, given.rounds, given.seconds))
            finally:
                service.stop()
    server.stop(1.0).wait()
    metrics = harness.Ratio("metrics_on", "tokens/s", harness.Target(least=0.99))
    traces = harness.Ratio("traces_on", "tokens/s", harness.Target(least=0.97))
    for bare, measured, traced in zip(*(found[mode] for mode in MODES), strict=True):
        metrics.add(measured, bare)
        traces.add(traced, measured)
    print(f"{receiver.spans:,} spans came")
    assert receiver.spans > 0
    harness.report("observability", [metrics, traces], given.rounds)


if __name__ == "__main__":
    main()
