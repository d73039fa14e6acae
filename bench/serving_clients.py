"""Clients of `bench.serving`: one asyncio loop that asks our gRPC service, and vLLM's own servers.

All ask for the same: a chat's answer of so many tokens at temperature 1, with the log-probability of each. What comes
back is counted and not parsed further, whoever sent it, so that clients take as little as they can of what the servers
share with them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from thumbwheel import errors
from thumbwheel.channels import Metadata, bearer, open_channel
from thumbwheel.client import to_prompt
from thumbwheel.tls import ClientTls
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceStub

SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """One response: seconds to its first token (to all of it, where it comes whole), and its tokens."""

    first: float
    tokens: int


Ask = Callable[[str, int], Awaitable[Answer]]
"""Asks one prompt for so many tokens."""


@dataclass
class Load:
    """What a number of responses came to."""

    seconds: float
    tokens: int
    firsts: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


async def load(ask: Ask, prompts: Sequence[str], tokens: int, *, at_once: int) -> Load:
    """Asks all prompts, `at_once` at a time."""
    answers: list[Answer] = []
    waiting = list(reversed(prompts))

    async def user() -> None:
        while waiting:
            answers.append(await ask(waiting.pop(), tokens))

    start = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(at_once)))
    taken = time.perf_counter() - start
    found = sum(answer.tokens for answer in answers)
    if found != tokens * len(prompts):
        raise RuntimeError(f"{found} tokens came instead of {tokens * len(prompts)}")
    return Load(taken, found, [answer.first for answer in answers])


@dataclass
class Ours:
    """Our policy service, at one of its doors."""

    address: str
    tls: ClientTls | None = None
    key: str = ""

    def __post_init__(self) -> None:
        self._channel = open_channel(self.address, tls=self.tls)
        self._stub: Any = PolicyServiceStub(self._channel)
        self._metadata: Metadata = bearer(self.key)

    async def stream(self, text: str, tokens: int) -> Answer:
        """In pieces."""
        request = pb.GenerateStreamRequest(prompt=to_prompt(text), sampling=_sampling(tokens))
        start, first, last = time.perf_counter(), 0.0, pb.GenerateStreamResponse()
        async for message in self._stub.GenerateStream(request, timeout=SECONDS, metadata=self._metadata):
            first, last = first or time.perf_counter() - start, message
        return Answer(first, len(last.finished.token_ids))

    async def unary(self, text: str, tokens: int) -> Answer:
        """Whole."""
        request = pb.GenerateRequest(prompt=to_prompt(text), sampling=_sampling(tokens))
        start = time.perf_counter()
        response = await self._stub.Generate(request, timeout=SECONDS, metadata=self._metadata)
        return Answer(time.perf_counter() - start, len(response.generation.token_ids))

    async def tokens_in_time(self, text: str, tokens: int, counted: Callable[[int], None]) -> float | None:
        """As `stream`, and tells of tokens as they come. Seconds until it was turned away, where it was."""
        request = pb.GenerateStreamRequest(prompt=to_prompt(text), sampling=_sampling(tokens))
        start = time.perf_counter()
        try:
            async for message in self._stub.GenerateStream(request, timeout=SECONDS, metadata=self._metadata):
                counted(len(message.delta.token_ids))
        except grpc.aio.AioRpcError as error:
            taken = time.perf_counter() - start
            if not isinstance(errors.from_rpc_error(error), errors.ResourceExhausted):
                raise
            return taken
        return None

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


def _sampling(tokens: int) -> pb.SamplingParams:
    return pb.SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)


@dataclass
class Http:
    """vLLM's OpenAI server: chat completions, streamed as server-sent events over kept connections."""

    port: int
    model: str
    logprobs: bool = True

    def __post_init__(self) -> None:
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def stream(self, text: str, tokens: int) -> Answer:
        """In pieces."""
        asked: Mapping[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 1.0,
            "max_completion_tokens": tokens,
            "ignore_eos": True,
            "logprobs": self.logprobs,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        reader, writer = await self._connection()
        start, first, usage = time.perf_counter(), 0.0, b""
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the HTTP server answers {status!r}")
        while (line := await reader.readline()) != b"0\r\n":
            if not line:
                raise RuntimeError("the HTTP server ended the connection")
            # The first event names the role; the second has the first token.
            if not first and line.startswith(b"data: ") and b'"role":"assistant"' not in line:
                first = time.perf_counter() - start
            if b'"usage":{' in line:
                usage = line
        await reader.readline()
        self._idle.append((reader, writer))
        return Answer(first, int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]))

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that was kept, and that the server has not closed meanwhile, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)

    async def close(self) -> None:
        """Ends the connections."""
        for _, writer in self._idle:
            writer.close()


@dataclass
class Smg:
    """vLLM's own gRPC server, which takes token ids and gives token ids."""

    port: int
    encode: Callable[[str], list[int]]

    def __post_init__(self) -> None:
        from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

        self._pb = vllm_engine_pb2
        self._channel = open_channel(f"127.0.0.1:{self.port}")
        self._stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(self._channel)
        self._number = 0

    async def unary(self, text: str, tokens: int) -> Answer:
        """Whole: a stream of one message, which is how it answers."""
        self._number += 1
        sampling = self._pb.SamplingParams(
            temperature=1.0,
            top_p=1.0,
            repetition_penalty=1.0,
            n=1,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,
            skip_special_tokens=True,
        )
        request = self._pb.GenerateRequest(
            request_id=f"bench-{self._number}",
            tokenized=self._pb.TokenizedInput(input_ids=self.encode(text)),
            sampling_params=sampling,
            stream=False,
        )
        start, count = time.perf_counter(), 0
        async for message in self._stub.Generate(request, timeout=SECONDS):
            if message.HasField("complete"):
                count = message.complete.completion_tokens
        return Answer(time.perf_counter() - start, count)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()
