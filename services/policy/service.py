"""The policy's gRPC service: prompts in, responses with log-probabilities, version spans and receipts out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc.aio
import uuid_utils
from prometheus_client import Counter, Histogram

from services.engine import Engine
from services.policy import sampling
from services.policy.recording import Recorder
from services.prompts import PromptEncoder
from thumbwheel import errors, serving
from thumbwheel.auth import ReceiptKey
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
_Request: TypeAlias = pb.GenerateRequest | pb.GenerateStreamRequest | pb.GenerateCandidatesRequest

TOKENS = Counter("thumbwheel_policy_tokens_total", "Tokens, by kind.", ["kind"])
FIRST_TOKEN = Histogram(
    "thumbwheel_policy_first_token_seconds",
    "Time from a streamed call to its first token.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
)
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH, "abort": pb.FINISH_REASON_ABORT}
MAX_CANDIDATES = 16
MAX_USER_ID = 128


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    max_tokens: int
    max_in_flight: int


@dataclass(frozen=True)
class _Asked:
    """A request that has been checked: what the engine and the record need of it."""

    tenant: str
    user_id: str
    prompt: pb.Prompt
    prompt_id: str
    prompt_ids: Sequence[int]
    params: pb.SamplingParams
    consent: bool | None
    candidate_count: int = 1


class PolicyService(PolicyServiceServicer):
    """Generates with the live version and records every response. See `proto/thumbwheel/v1/policy.proto`."""

    def __init__(
        self, *, engine: Engine, encoder: PromptEncoder, recorder: Recorder, key: ReceiptKey, limits: Limits
    ) -> None:
        self._engine, self._encoder, self._recorder, self._key, self._limits = engine, encoder, recorder, key, limits
        self._in_flight = 0

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """One response, whole."""
        asked = self._check(request, context)
        return pb.GenerateResponse(generation=await self._whole(asked, 0))

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One response, in pieces."""
        asked = self._check(request, context)
        started: float | None = asyncio.get_running_loop().time()
        async for piece in self._pieces(asked, 0, stream=True):
            if started is not None:
                FIRST_TOKEN.observe(asyncio.get_running_loop().time() - started)
                started = None
            if isinstance(piece, pb.Generation):
                yield pb.GenerateStreamResponse(finished=piece)
            else:
                yield pb.GenerateStreamResponse(delta=piece)

    async def GenerateCandidates(
        self, request: pb.GenerateCandidatesRequest, context: Context
    ) -> pb.GenerateCandidatesResponse:
        """Several responses to one prompt; they run together and share the prompt's KV cache."""
        if not 2 <= request.n <= MAX_CANDIDATES:
            raise errors.InvalidArgument(f"is {request.n}; it must be from 2 to {MAX_CANDIDATES}.", field="n")
        asked = self._check(request, context, count=request.n)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._whole(asked, index)) for index in range(request.n)]
        return pb.GenerateCandidatesResponse(prompt_id=asked.prompt_id, candidates=[task.result() for task in tasks])

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        """What is live here, and since when."""
        return pb.GetPolicyResponse(
            version=self._engine.version,
            model=self._engine.live.manifest.base_model,
            max_model_len=self._limits.max_model_len,
            max_tokens=self._limits.max_tokens,
            swaps=self._engine.swaps,
            requests_in_flight=self._in_flight,
        )

    def _check(self, request: _Request, context: Context, *, count: int = 1) -> _Asked:
        prompt, given, user_id = request.prompt, request.sampling, request.user_id
        if self._in_flight + count > self._limits.max_in_flight:
            raise errors.ResourceExhausted(
                f"{self._in_flight} requests are in flight, the most allowed.", retry_after=1.0
            )
        if len(user_id) > MAX_USER_ID:
            raise errors.InvalidArgument(
                f"has {len(user_id)} characters; at most {MAX_USER_ID} are allowed.", field="user_id"
            )
        params = sampling.resolve(given, max_tokens=self._limits.max_tokens, vocab_size=self._encoder.vocab_size)
        ids = self._encoder.encode(prompt)
        room = self._limits.max_model_len - len(ids)
        if room < 1:
            raise errors.InvalidArgument(
                f"has {len(ids)} tokens; with at least one of response, at most {self._limits.max_model_len} fit.",
                field="prompt",
                remedy="Shorten it.",
            )
        if params.min_tokens > room:
            raise errors.InvalidArgument(
                f"is {params.min_tokens}, but only {room} tokens fit after the prompt.", field="sampling.min_tokens"
            )
        params.max_tokens = min(params.max_tokens, room)
        return _Asked(
            tenant=serving.tenant(context),
            user_id=user_id,
            prompt=prompt,
            prompt_id=str(uuid_utils.uuid7()),
            prompt_ids=ids,
            params=params,
            consent=request.consent if request.HasField("consent") else None,
            candidate_count=count,
        )

    async def _whole(self, asked: _Asked, index: int) -> pb.Generation:
        async for piece in self._pieces(asked, index, stream=False):
            if isinstance(piece, pb.Generation):
                return piece
        raise errors.Internal("The engine ended a request without a response.")

    async def _pieces(
        self, asked: _Asked, index: int, *, stream: bool
    ) -> AsyncIterator[pb.GenerationDelta | pb.Generation]:
        """Deltas as they come, then the finished generation. A caller that goes away aborts the request."""
        import vllm

        generation = pb.Generation(
            generation_id=str(uuid_utils.uuid7()), prompt_id=asked.prompt_id, prompt_tokens=len(asked.prompt_ids)
        )
        self._in_flight += 1
        try:
            async for output in self._engine.llm.generate(
                vllm.TokensPrompt(prompt_token_ids=list(asked.prompt_ids)),
                sampling.to_vllm(asked.params, stream=stream, seed_offset=index),
                generation.generation_id,
            ):
                completion = output.outputs[0]
                ids = list(completion.token_ids)
                logprobs = [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
                generation.text += completion.text
                generation.token_ids.extend(ids)
                generation.logprobs.extend(logprobs)
                if stream and (ids or completion.text):
                    yield pb.GenerationDelta(text=completion.text, token_ids=ids, logprobs=logprobs)
                if completion.finish_reason is not None:
                    self._finish(asked, index, generation, completion)
                    yield generation
                    return
        finally:
            self._in_flight -= 1

    def _finish(self, asked: _Asked, index: int, generation: pb.Generation, completion: Any) -> None:
        """Fills in what is known at the end, signs the receipt, and hands the event to the recorder."""
        generation.finish_reason = _FINISH.get(completion.finish_reason, pb.FINISH_REASON_ABORT)
        for span in completion.weight_versions or ():
            generation.spans.add(version=span.version, start=span.start, end=span.end)
        claims = pb.ReceiptClaims(
            tenant=asked.tenant,
            generation_id=generation.generation_id,
            prompt_id=asked.prompt_id,
            prompt_sha256=prompt_sha256(asked.prompt_ids),
            response_sha256=hashlib.sha256(generation.text.encode()).digest(),
            version=generation.spans[-1].version if generation.spans else self._engine.version,
        )
        claims.issued_at.GetCurrentTime()
        generation.receipt.CopyFrom(self._key.sign(claims))
        TOKENS.labels("prompt").inc(len(asked.prompt_ids))
        TOKENS.labels("response").inc(len(generation.token_ids))
        self._recorder.record(
            GenerationEvent(
                event_id=generation.generation_id,
                tenant=asked.tenant,
                user_id=asked.user_id,
                prompt=asked.prompt,
                prompt_token_ids=asked.prompt_ids,
                generation=generation,
                sampling=asked.params,
                candidate_index=index,
                candidate_count=asked.candidate_count,
                finished_at=claims.issued_at,
                consent=asked.consent,
            )
        )


def prompt_sha256(ids: Sequence[int]) -> bytes:
    """SHA-256 of a prompt as the model saw it: its token ids as little-endian uint32."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).digest()
