"""The reward model's gRPC service: a prompt and a response in, a score and its version out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import grpc.aio
import uuid_utils
from prometheus_client import Counter, Gauge, Histogram

from services.admission import Admission
from services.engine import Engine
from services.prompts import PromptEncoder
from services.reward.reading import Reading
from services.reward.reference import LOOKUPS, Baselines, References, Tokens
from thumbwheel import errors
from thumbwheel.v1 import reward_pb2 as pb
from thumbwheel.v1.policy_pb2 import Prompt
from thumbwheel.v1.reward_pb2_grpc import RewardServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]

SCORED = Counter("thumbwheel_reward_scored_total", "Responses scored.")
SCORE = Histogram("thumbwheel_reward_score", "Scores given.", buckets=(-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8))
UNCERTAINTY = Gauge("thumbwheel_reward_uncertainty", "Uncertainty of the last score, in units of the score.")
MAX_ITEMS = 256
READ_AHEAD = 32
"""Items of a stream that are scored at a time."""


class _Said(NamedTuple):
    """What a version's K heads say."""

    values: list[list[float]]
    """[N, K] of sequences."""
    baselines: dict[Tokens, Sequence[float]]
    """[K] of each reference."""
    reading: Reading
    version: str


class RewardService(RewardServiceServicer):
    """Scores with the live version. See `proto/thumbwheel/v1/reward.proto`."""

    def __init__(
        self,
        *,
        engine: Engine,
        encoder: PromptEncoder,
        max_model_len: int,
        admission: Admission,
        references: References,
        baselines: Baselines,
    ) -> None:
        self._engine, self._encoder = engine, encoder
        self._max_len = max_model_len
        self._admission, self._references, self._baselines = admission, references, baselines

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Scores of all items, by one version."""
        if not 1 <= len(request.items) <= MAX_ITEMS:
            raise errors.InvalidArgument(f"has {len(request.items)}; 1 to {MAX_ITEMS} are allowed.", field="items")
        scores, version = await self._scores([(item, f"items[{index}].") for index, item in enumerate(request.items)])
        return pb.ScoreResponse(scores=scores, version=version)

    async def ScoreStream(
        self, request_iterator: AsyncIterator[pb.ScoreStreamRequest], context: Context
    ) -> AsyncIterator[pb.ScoreStreamResponse]:
        """Scores in the order asked, each by the version live when it was its turn; some are scored at a time."""
        waiting: asyncio.Queue[asyncio.Task[pb.ScoreStreamResponse] | None] = asyncio.Queue(READ_AHEAD)
        begun: set[asyncio.Task[pb.ScoreStreamResponse]] = set()

        async def read() -> None:
            async for request in request_iterator:
                task = asyncio.create_task(self._streamed(request.item))
                begun.add(task)
                task.add_done_callback(begun.discard)
                await waiting.put(task)
            await waiting.put(None)

        reading = asyncio.create_task(read())
        try:
            while (task := await self._next(waiting, reading)) is not None:
                yield await task
        finally:
            reading.cancel()
            for left in list(begun):
                left.cancel()
            await asyncio.gather(reading, *begun, return_exceptions=True)

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Probability that A is preferred, by Bradley and Terry, and how sure the model is of it."""
        encoded = [
            self._encode(request.prompt, response, prefix="", name=name)
            for name, response in (("response_a", request.response_a), ("response_b", request.response_b))
        ]
        said = await self._ask(encoded)
        a, b = said.values
        response = pb.CompareResponse(version=said.version)
        response.score_a.CopyFrom(said.reading.score(a, None, len(encoded[0])))
        response.score_b.CopyFrom(said.reading.score(b, None, len(encoded[1])))
        said.reading.compare(a, b, response)
        return response

    async def GetReward(self, request: pb.GetRewardRequest, context: Context) -> pb.GetRewardResponse:
        """What is live here, and since when."""
        reading = Reading.of(self._engine.live)
        return pb.GetRewardResponse(
            version=self._engine.version,
            max_model_len=self._max_len,
            swaps=self._engine.swaps,
            temperature=reading.temperature,
            aspects=reading.heads.aspects,
        )

    @staticmethod
    async def _next(
        waiting: asyncio.Queue[asyncio.Task[pb.ScoreStreamResponse] | None], reading: asyncio.Task[None]
    ) -> asyncio.Task[pb.ScoreStreamResponse] | None:
        """The next in order. Raises what ended the reading of requests."""
        taking = asyncio.create_task(waiting.get())
        await asyncio.wait({taking, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not taking.done() and reading.done():
            with contextlib.suppress(asyncio.CancelledError):
                await reading  # it may have failed
        return await taking

    async def _streamed(self, item: pb.ScoreItem) -> pb.ScoreStreamResponse:
        (score,), version = await self._scores([(item, "item.")])
        return pb.ScoreStreamResponse(score=score, version=version)

    async def _scores(self, items: Sequence[tuple[pb.ScoreItem, str]]) -> tuple[list[pb.RewardScore], str]:
        """Scores of items, each with what comes before the names of its fields; over the reference where one is known.
        A version scores each reference once.
        """
        encoded = [self._encode(item.prompt, item.response, prefix=prefix) for item, prefix in items]
        references = [tuple(await self._reference(item, prefix)) for item, prefix in items]
        said = await self._ask(encoded, list(dict.fromkeys(filter(None, references))))
        scores = [
            said.reading.score(found, said.baselines.get(reference), len(ids))
            for ids, found, reference in zip(encoded, said.values, references, strict=True)
        ]
        for score in scores:
            SCORED.inc()
            SCORE.observe(score.score)
            if score.HasField("uncertainty"):
                UNCERTAINTY.set(score.uncertainty)
        return scores, said.version

    async def _reference(self, item: pb.ScoreItem, prefix: str) -> list[int]:
        """Token ids of prompt and reference response; empty without one."""
        if item.reference_response:
            return self._encode(item.prompt, item.reference_response, prefix=prefix, name="reference_response")
        response = await self._references.response(item.prompt)
        try:
            return self._encode(item.prompt, response, prefix=prefix) if response else []
        except errors.InvalidArgument:  # too long, of which the caller knows nothing
            LOOKUPS.labels("too_long").inc()
            return []

    def _encode(self, prompt: Prompt, response: str, *, prefix: str, name: str = "response") -> list[int]:
        return self._encoder.encode_scored(
            prompt, response, limit=self._max_len, field=f"{prefix}prompt", response_field=f"{prefix}{name}"
        )

    async def _ask(self, sequences: Sequence[list[int]], references: Sequence[Tokens] = ()) -> _Said:
        """What all heads say of sequences, and of references, by one version."""
        known = self._baselines.known(self._engine.version, references)
        expected = [*sequences, *(ids for ids in references if ids not in known)]
        with self._admission.admit(prompt=sum(map(len, expected)), sequences=len(expected)) as ticket:
            async with self._engine.turnstile.call():
                version, reading = self._engine.version, Reading.of(self._engine.live)
                known = self._baselines.known(version, references)  # a swap may have come in between
                new = [ids for ids in references if ids not in known]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._one(ids)) for ids in (*sequences, *map(list, new))]
                values = [task.result() for task in tasks]
                scored = dict(zip(new, values[len(sequences) :], strict=True))
                self._baselines.keep(version, scored)
            ticket.used = 0  # beyond what was read
        return _Said(values[: len(sequences)], {**known, **scored}, reading, version)

    async def _one(self, ids: list[int]) -> list[float]:
        import vllm

        params = vllm.PoolingParams(task="classify", use_activation=False)
        async for output in self._engine.llm.encode(
            vllm.TokensPrompt(prompt_token_ids=ids), params, str(uuid_utils.uuid7())
        ):
            values: list[float] = output.outputs.data.float().flatten().tolist()
            return values
        raise errors.Internal("The engine ended a request without a score.")
