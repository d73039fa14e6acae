"""The servers of `bench.serving`, as processes: our policy service, and vLLM's own servers with engines set alike."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from services.engine import computing_dtype
from tests.support import free_port
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker

MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 64


@dataclass
class Server:
    """A server process, and what it takes of the processor."""

    popen: subprocess.Popen[Any]

    @property
    def front_end_seconds(self) -> float:
        """Processor time of the process itself so far, without its engine's processes."""
        times = psutil.Process(self.popen.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        """Ends it and its children."""
        children = psutil.Process(self.popen.pid).children(recursive=True)
        self.popen.terminate()
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(10)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


class Policy(Server):
    """`bench.serving_server`, told what to do a line at a time."""

    async def tell(self, command: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What it answers; None: what it says first, when it is ready."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        if command is not None:
            self.popen.stdin.write(json.dumps(command) + "\n")
            self.popen.stdin.flush()
        async with asyncio.timeout(300):
            line = await asyncio.to_thread(self.popen.stdout.readline)
        if not line:
            raise RuntimeError("The policy ended; the log above says why.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment(threads_bind: str = "auto") -> dict[str, str]:
    """As `services.engine` sets it, for vLLM's own servers."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": threads_bind,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def engine_arguments(model: Path, port: int) -> list[str]:
    """The engine as our service's defaults have it."""
    import torch

    dtype = computing_dtype(on_cpu=not torch.cuda.is_available())
    return [
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--enforce-eager"),
    ]


@contextlib.contextmanager
def broker_with_topics(folder: Path) -> Iterator[EmbeddedBroker]:
    """A broker that has what servers write to."""
    with EmbeddedBroker(port=free_port(), log=folder / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        log.close()
        yield broker


@contextlib.contextmanager
def policy_server(model: Path, home: Path, bootstrap_servers: str) -> Iterator[Policy]:
    """Ours, with an engine of its own."""
    command = [sys.executable, "-m", "bench.serving_server", "--model", str(model), "--home", str(home)]
    command += ["--bootstrap-servers", bootstrap_servers]
    policy = Policy(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        yield policy
    finally:
        policy.stop()


@contextlib.contextmanager
def http_server(model: Path, log: Path, *more: str, threads_bind: str = "auto") -> Iterator[tuple[Server, int]]:
    """vLLM's OpenAI server, without its log of requests; `more` are further arguments."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *engine_arguments(model, port)]
    command += ["--served-model-name", "default", "--uvicorn-log-level", "warning", *more]
    with log.open("wb") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment(threads_bind), text=True)
    server = Server(popen)
    try:
        _wait(server, log, lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close())
        yield server, port
    finally:
        server.stop()


@contextlib.contextmanager
def grpc_server(model: Path, log: Path) -> Iterator[tuple[Server, int]]:
    """vLLM's gRPC server."""
    import grpc
    from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server", *engine_arguments(model, port)]
    with log.open("wb") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment(), text=True)
    server = Server(popen)

    def check() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest(), timeout=5)

    try:
        _wait(server, log, check)
        yield server, port
    finally:
        server.stop()


def _wait(server: Server, log: Path, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            check()
            return
        except Exception as error:  # each kind of server is away in its own way
            if server.popen.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"A peer did not start; its log ends:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)
