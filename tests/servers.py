"""Servers for tests: the life cycle is the real one, what they answer is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tests.support import free_port
from thumbwheel import serving
from thumbwheel.access import Security
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1 import preference_pb2
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server
from thumbwheel.v1.preference_pb2_grpc import PreferenceServiceServicer, add_PreferenceServiceServicer_to_server


class Service(PolicyServiceServicer):
    """Does what its `answer` says."""

    def __init__(self, answer: Callable[[], Awaitable[pb.GenerateResponse]]) -> None:
        self.answer = answer
        self.tenants: list[str] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self.tenants.append(serving.tenant(context))
        return await self.answer()

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        yield pb.GenerateStreamResponse(delta=pb.GenerationDelta(text="one"))
        await self.answer()

    async def GenerateCandidates(self, request: Any, context: Any) -> Any: ...

    async def ForgetGenerations(self, request: Any, context: Any) -> Any: ...

    async def GenerateBulk(
        self, request_iterator: AsyncIterator[pb.GenerateBulkRequest], context: Any
    ) -> AsyncIterator[pb.GenerateBulkResponse]:
        async for request in request_iterator:
            yield pb.GenerateBulkResponse(request_id=request.request_id)
            await self.answer()

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(version="policy-000000")


class Feedback(PreferenceServiceServicer):
    """Knows two methods, one a plane."""

    async def Forget(self, request: preference_pb2.ForgetRequest, context: Any) -> preference_pb2.ForgetResponse:
        return preference_pb2.ForgetResponse(feedback_erased=7)

    async def GetFeedback(
        self, request: preference_pb2.GetFeedbackRequest, context: Any
    ) -> preference_pb2.GetFeedbackResponse:
        return preference_pb2.GetFeedbackResponse()

    async def SubmitFeedback(self, request: Any, context: Any) -> Any: ...

    async def SubmitFeedbackBatch(self, request: Any, context: Any) -> Any: ...

    async def StreamFeedback(self, request_iterator: Any, context: Any) -> Any: ...

    async def Retract(self, request: Any, context: Any) -> Any: ...

    async def ListFeedback(self, request: Any, context: Any) -> Any: ...

    async def NextComparison(self, request: Any, context: Any) -> Any: ...

    async def GetGuidelines(self, request: Any, context: Any) -> Any: ...


class Running:
    """A server in this loop. `options` are those of `serving.serve`."""

    def __init__(
        self,
        service: Service | Feedback,
        background: dict[str, Any] | None = None,
        security: Security | None = None,
        **options: Any,
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        add: Any = (
            add_PolicyServiceServicer_to_server
            if isinstance(service, Service)
            else add_PreferenceServiceServicer_to_server
        )
        name = "PolicyService" if isinstance(service, Service) else "PreferenceService"
        self.task = asyncio.create_task(
            serving.serve(
                process="test",
                listen=self.address,
                metrics_port=0,
                services=[f"thumbwheel.v1.{name}"],
                register=lambda server: add(service, server),
                background=background or {},
                drain_seconds=5,
                security=security,
                **options,
            )
        )

    async def stop(self) -> None:
        """As an operator would."""
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(self.task, 10)
