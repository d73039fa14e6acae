"""Policy and reward services for the trainer's tests: real gRPC servers in a thread, whose answers are made up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from tests.support import free_port
from thumbwheel.client import AsyncClient
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1 import reward_pb2
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server
from thumbwheel.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server

EOS = 2


class _Policy(PolicyServiceServicer):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def GenerateBulk(
        self, request_iterator: AsyncIterator[pb.GenerateBulkRequest], context: Any
    ) -> AsyncIterator[pb.GenerateBulkResponse]:
        async for request in request_iterator:
            self._fleet.asked.append(request.request_id)
            response = pb.GenerateBulkResponse(request_id=request.request_id)
            if error := self._fleet.refuse(request):
                response.error.CopyFrom(error)
            else:
                response.generations.extend(self._generation(request, index) for index in range(request.n))
            yield response

    async def Generate(self, request: Any, context: Any) -> Any: ...
    def GenerateStream(self, request: Any, context: Any) -> Any: ...
    async def GenerateCandidates(self, request: Any, context: Any) -> Any: ...
    async def GetPolicy(self, request: Any, context: Any) -> Any: ...
    async def ForgetGenerations(self, request: Any, context: Any) -> Any: ...

    def _generation(self, request: pb.GenerateBulkRequest, index: int) -> pb.Generation:
        ids = [*self._fleet.say(list(request.prompt.tokens.ids), index), EOS]
        generation = pb.Generation(
            text=" ".join(map(str, ids)),
            token_ids=ids,
            logprobs=[-1.0 - 0.01 * place for place in range(len(ids))],
            finish_reason=pb.FINISH_REASON_STOP,
        )
        generation.spans.add(version=self._fleet.version, start=0, end=len(ids))
        return generation


class _Reward(RewardServiceServicer):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        if self._fleet.denies:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Not for you.")
        return reward_pb2.ScoreResponse(
            scores=[self._score(item) for item in request.items], version=self._fleet.reward_version
        )

    def ScoreStream(self, request_iterator: Any, context: Any) -> Any: ...
    async def Compare(self, request: Any, context: Any) -> Any: ...
    async def GetReward(self, request: Any, context: Any) -> Any: ...

    def _score(self, item: reward_pb2.ScoreItem) -> reward_pb2.RewardScore:
        score = reward_pb2.RewardScore(score=self._fleet.judge(item.response))
        if item.reference_response:
            score.score_over_reference = score.score - self._fleet.judge(item.reference_response)
        if self._fleet.doubt is not None:
            score.uncertainty = self._fleet.doubt(item.response)
        return score


class Fleet:
    """Both services, each of which can be taken away and brought back. Answers follow from the prompt."""

    def __init__(self) -> None:
        self.version, self.reward_version = "policy-000000", "reward-000001"
        self.asked: list[str] = []
        """Ids of all requests that the policy read."""
        self.say: Callable[[list[int], int], list[int]] = lambda prompt, index: [prompt[0] + 1, *range(40, 43 + index)]
        self.judge: Callable[[str], float] = lambda text: -float(len(text.split()))
        self.doubt: Callable[[str], float] | None = None
        """How unsure the reward model is of a text; None where it has no ensemble."""
        self.refuse: Callable[[pb.GenerateBulkRequest], pb.BulkError | None] = lambda request: None
        self.denies = False
        """Whether the reward service lets nobody in."""
        self._ports = {"policy": free_port(), "reward": free_port()}
        self._servers: dict[str, grpc.aio.Server] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start("policy")
        self.start("reward")

    def address(self, name: str) -> str:
        """Where a service listens."""
        return f"127.0.0.1:{self._ports[name]}"

    def connect(self) -> AsyncClient:
        """A client of both."""
        return AsyncClient(policy=self.address("policy"), reward=self.address("reward"), timeout=10)

    def start(self, name: str) -> None:
        """Brings a service back."""
        self._call(self._start(name))

    def stop(self, name: str) -> None:
        """Takes a service away; its calls break."""
        self._call(self._servers.pop(name).stop(None))

    def close(self) -> None:
        """Takes all away."""
        for name in list(self._servers):
            self.stop(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self, name: str) -> None:
        # Without this, a connection may reach the server before, which listens until it has ended, and never answers.
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        if name == "policy":
            add_PolicyServiceServicer_to_server(_Policy(self), server)
        else:
            add_RewardServiceServicer_to_server(_Reward(self), server)
        assert server.add_insecure_port(self.address(name))
        await server.start()
        self._servers[name] = server

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)
