"""The reward model's gRPC service: a prompt and a response in, a score and its version out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import uuid_utils
from prometheus_client import Counter, Histogram

from services.admission import Admission
from services.engine import Engine
from services.prompts import PromptEncoder, check_length
from thumbwheel import errors
from thumbwheel.v1 import reward_pb2 as pb
from thumbwheel.v1.policy_pb2 import Prompt
from thumbwheel.v1.reward_pb2_grpc import RewardServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]

SCORED = Counter("thumbwheel_reward_scored_total", "Responses scored.")
SCORE = Histogram("thumbwheel_reward_score", "Scores given.", buckets=(-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8))
MAX_ITEMS = 256


class RewardService(RewardServiceServicer):
    """Scores with the live version. See `proto/thumbwheel/v1/reward.proto`."""

    def __init__(self, *, engine: Engine, encoder: PromptEncoder, max_model_len: int, admission: Admission) -> None:
        self._engine, self._encoder = engine, encoder
        self._max_len = max_model_len
        self._admission = admission

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Scores of all items, by one version."""
        if not 1 <= len(request.items) <= MAX_ITEMS:
            raise errors.InvalidArgument(f"has {len(request.items)}; 1 to {MAX_ITEMS} are allowed.", field="items")
        encoded = [
            self._encode(item.prompt, item.response, field=f"items[{index}]")
            for index, item in enumerate(request.items)
        ]
        scores, version = await self._score(encoded)
        return pb.ScoreResponse(scores=scores, version=version)

    async def ScoreStream(
        self, request_iterator: AsyncIterator[pb.ScoreStreamRequest], context: Context
    ) -> AsyncIterator[pb.ScoreStreamResponse]:
        """Scores in the order asked, each by the version live when it was asked."""
        async for request in request_iterator:
            item = request.item
            (score,), version = await self._score([self._encode(item.prompt, item.response, field="item")])
            yield pb.ScoreStreamResponse(score=score, version=version)

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Probability that A is preferred: σ(r(x, a) − r(x, b)), Bradley and Terry."""
        encoded = [
            self._encode(request.prompt, response, field="", name=name)
            for name, response in (("response_a", request.response_a), ("response_b", request.response_b))
        ]
        (a, b), version = await self._score(encoded)
        probability = 1.0 / (1.0 + math.exp(min(b.score - a.score, 80.0)))
        return pb.CompareResponse(probability_a=probability, score_a=a, score_b=b, version=version)

    async def GetReward(self, request: pb.GetRewardRequest, context: Context) -> pb.GetRewardResponse:
        """What is live here, and since when."""
        return pb.GetRewardResponse(version=self._engine.version, max_model_len=self._max_len, swaps=self._engine.swaps)

    def _encode(self, prompt: Prompt, response: str, *, field: str, name: str = "response") -> list[int]:
        path = f"{field}." if field else ""
        ids = self._encoder.encode_scored(prompt, response, field=f"{path}prompt", response_field=f"{path}{name}")
        check_length(ids, self._max_len, field=f"{path}{name}")
        return ids

    async def _score(self, sequences: Sequence[list[int]]) -> tuple[list[pb.RewardScore], str]:
        tokens = sum(len(ids) for ids in sequences)
        with self._admission.admit(prompt=tokens, sequences=len(sequences)) as ticket:
            async with self._engine.turnstile.call():
                version = self._engine.version
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._one(ids)) for ids in sequences]
            ticket.used = 0  # beyond what was read
            return [task.result() for task in tasks], version

    async def _one(self, ids: list[int]) -> pb.RewardScore:
        import vllm

        params = vllm.PoolingParams(task="classify", use_activation=False)
        async for output in self._engine.llm.encode(
            vllm.TokensPrompt(prompt_token_ids=ids), params, str(uuid_utils.uuid7())
        ):
            score = float(output.outputs.data.float().item())
            SCORED.inc()
            SCORE.observe(score)
            return pb.RewardScore(score=score, tokens=len(ids))
        raise errors.Internal("The engine ended a request without a score.")
