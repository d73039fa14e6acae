"""The policy's gRPC service: prompts in, responses with log-probabilities, version spans and receipts out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from prometheus_client import Histogram

from services.admission import Admission
from services.policy import sampling
from services.policy.bulk import Bulk
from services.policy.generating import Asked, Generating
from thumbwheel import errors, serving, tracing
from thumbwheel.calls import MAX_MESSAGE_BYTES
from thumbwheel.forgotten import is_expired, is_forgotten
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]

FIRST_TOKEN = Histogram(
    "thumbwheel_policy_first_token_seconds",
    "Time from a streamed call to its first token.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
)
MAX_CANDIDATES = 16


def _consent(request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.GenerateCandidatesRequest) -> bool | None:
    """What the user said to learning from it; None: not asked."""
    return request.consent if request.HasField("consent") else None


class PolicyService(PolicyServiceServicer):
    """Generates with the live version and records every response. See `proto/thumbwheel/v1/policy.proto`."""

    def __init__(self, generating: Generating, admission: Admission, bulk: Bulk, *, coalesce: float) -> None:
        self._generating, self._admission, self._bulk, self._coalesce = generating, admission, bulk, coalesce

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """One response, whole."""
        self._admission.turn_away()
        asked = self._generating.check(
            request.prompt,
            request.sampling,
            tenant=serving.tenant(context),
            user_id=request.user_id,
            version=request.version,
            consent=_consent(request),
        )
        (generation,) = await self._all(asked)
        return pb.GenerateResponse(generation=generation)

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One response, in pieces."""
        self._admission.turn_away()
        asked = self._generating.check(
            request.prompt,
            request.sampling,
            tenant=serving.tenant(context),
            user_id=request.user_id,
            version=request.version,
            consent=_consent(request),
            stream=True,
        )
        started: float | None = asyncio.get_running_loop().time()
        with self._admission.admit(prompt=len(asked.prompt_ids), allowed=asked.params.max_tokens) as ticket:
            async for piece in self._generating.pieces(asked, 0, stream=True, coalesce=self._coalesce):
                if started is not None:
                    FIRST_TOKEN.observe(asyncio.get_running_loop().time() - started, tracing.exemplar())
                    started = None
                if isinstance(piece, pb.Generation):
                    ticket.used = len(piece.token_ids)
                    yield pb.GenerateStreamResponse(finished=piece)
                else:
                    yield pb.GenerateStreamResponse(delta=piece)

    async def GenerateCandidates(
        self, request: pb.GenerateCandidatesRequest, context: Context
    ) -> pb.GenerateCandidatesResponse:
        """Several responses to one prompt, to be compared."""
        if not 2 <= request.n <= MAX_CANDIDATES:
            raise errors.InvalidArgument(f"is {request.n}; it must be from 2 to {MAX_CANDIDATES}.", field="n")
        self._admission.turn_away()
        asked = self._generating.check(
            request.prompt,
            request.sampling,
            tenant=serving.tenant(context),
            user_id=request.user_id,
            version=request.version,
            consent=_consent(request),
            count=request.n,
        )
        return pb.GenerateCandidatesResponse(prompt_id=asked.prompt_id, candidates=await self._all(asked))

    async def GenerateBulk(
        self, request_iterator: AsyncIterator[pb.GenerateBulkRequest], context: Context
    ) -> AsyncIterator[pb.GenerateBulkResponse]:
        """Many responses, behind people's."""
        async for response in self._bulk.serve(request_iterator, tenant=serving.tenant(context)):
            yield response

    async def ForgetGenerations(
        self, request: pb.ForgetGenerationsRequest, context: Context
    ) -> pb.ForgetGenerationsResponse:
        """Returns when nothing of them is left in a file of this server."""
        hashes = set(request.hashes)
        before = {tenant: time.ToMicroseconds() for tenant, time in request.finished_before.items()}
        erased = await self._generating.recorder.erase(
            lambda event: is_forgotten(event, hashes) or is_expired(event, before)
        )
        return pb.ForgetGenerationsResponse(erased=erased)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        """What is live here, and since when."""
        engine, limits = self._generating.engine, self._generating.limits
        return pb.GetPolicyResponse(
            version=engine.version,
            model=engine.live.manifest.base_model,
            max_model_len=limits.max_model_len,
            max_tokens=limits.max_tokens,
            swaps=engine.swaps,
            requests_in_flight=self._admission.in_flight + self._bulk.running,
            max_candidates=MAX_CANDIDATES,
            max_logprobs=sampling.MAX_LOGPROBS,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_bulk_running=self._bulk.slots,
            versions=[engine.version],
        )

    async def _all(self, asked: Asked) -> list[pb.Generation]:
        count = asked.candidate_count
        allowed = count * asked.params.max_tokens
        with self._admission.admit(prompt=len(asked.prompt_ids), allowed=allowed, sequences=count) as ticket:
            generations = await self._generating.all(asked)
            ticket.used = sum(len(generation.token_ids) for generation in generations)
            return generations
