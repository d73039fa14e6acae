"""Errors cross the wire and come back as themselves; a server lives and dies as it should."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.support import free_port
from thumbwheel import errors, serving
from thumbwheel.client import AsyncClient, Client
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server

RAISED = [
    errors.InvalidArgument("is 3.", field="sampling.temperature", remedy="Lower it."),
    errors.NotFound("No such thing."),
    errors.Conflict("Used before."),
    errors.PermissionDenied("Forged."),
    errors.FailedPrecondition("Not now.", remedy="Type `thumbwheel up`."),
    errors.CorruptCheckpoint("model.safetensors is short."),
    errors.NoSpace("The disk is full.", remedy="Free some."),
    errors.ResourceExhausted("Too much.", retry_after=60.5),  # later than the deadline: not waited for
    errors.DeadlineExceeded("Too long."),
    errors.Internal("Ours."),
]


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

    async def GetPolicy(self, request: Any, context: Any) -> Any: ...


class Running:
    """A server in this loop."""

    def __init__(self, service: Service, background: dict[str, Any] | None = None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.task = asyncio.create_task(
            serving.serve(
                process="test",
                listen=self.address,
                metrics_port=0,
                services=["thumbwheel.v1.PolicyService"],
                register=lambda server: add_PolicyServiceServicer_to_server(service, server),
                background=background or {},
                drain_seconds=5,
            )
        )

    async def stop(self) -> None:
        """As an operator would."""
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(self.task, 10)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_an_error_comes_back_as_itself(error: errors.ThumbwheelError) -> None:
    async def answer() -> pb.GenerateResponse:
        raise error

    service = Service(answer)
    running = Running(service)
    async with AsyncClient(policy=running.address, tenant="acme", timeout=10) as client:
        with pytest.raises(type(error)) as caught:
            await client.generate("hi")
        with pytest.raises(type(error)) as streamed:
            [piece async for piece in client.stream("hi")]
    await running.stop()
    assert service.tenants == ["acme"]
    for one in (caught.value, streamed.value):
        assert type(one) is type(error)
        assert one.code == error.code
        if not isinstance(error, errors.Internal):
            assert (one.message, one.remedy) == (error.message, error.remedy)
        if isinstance(error, errors.InvalidArgument):
            assert isinstance(one, errors.InvalidArgument)
            assert one.field == error.field
        if isinstance(error, errors.ResourceExhausted):
            assert isinstance(one, errors.ResourceExhausted)
            assert one.retry_after == 60.5


async def test_a_bug_does_not_leak_its_text() -> None:
    async def answer() -> pb.GenerateResponse:
        raise KeyError("secret")

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        with pytest.raises(errors.Internal) as caught:
            await client.generate("hi")
    await running.stop()
    assert "secret" not in str(caught.value)


async def test_sigterm_drains(caplog: pytest.LogCaptureFixture) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def answer() -> pb.GenerateResponse:
        inside.set()
        await go_on.wait()
        return pb.GenerateResponse(generation=pb.Generation(text="done"))

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        call = asyncio.create_task(client.generate("hi"))
        await inside.wait()
        stopping = asyncio.create_task(running.stop())
        go_on.set()
        assert (await call).text == "done"
        await stopping


async def test_a_background_task_that_ends_stops_the_server() -> None:
    async def ends() -> None:
        return

    async def answer() -> pb.GenerateResponse:
        return pb.GenerateResponse()

    running = Running(Service(answer), {"short-lived": ends})
    with pytest.raises(errors.Internal, match="short-lived"):
        await asyncio.wait_for(running.task, 10)


async def test_a_taken_port_names_itself() -> None:
    async def answer() -> pb.GenerateResponse:
        return pb.GenerateResponse()

    first = Running(Service(answer))
    async with AsyncClient(policy=first.address, timeout=10) as client:
        await client.generate("hi")
        second = Running(Service(answer))
        second.task.cancel()
        with pytest.raises(errors.PortInUse, match=first.address):
            await serving.serve(
                process="second",
                listen=first.address,
                metrics_port=0,
                services=[],
                register=lambda server: None,
                background={},
            )
        # The first one's signal handlers were replaced by the second's and removed with it.
        first.task.cancel()
        await asyncio.gather(first.task, second.task, return_exceptions=True)


async def test_the_client_tries_again_while_the_server_is_away() -> None:
    tries = 0

    async def answer() -> pb.GenerateResponse:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise errors.Unavailable("Not yet.")
        return pb.GenerateResponse(generation=pb.Generation(text="third"))

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        assert (await client.generate("hi")).text == "third"
    await running.stop()
    assert tries == 3


async def test_the_blocking_client_does_the_same() -> None:
    async def answer() -> pb.GenerateResponse:
        return pb.GenerateResponse(generation=pb.Generation(text="hello"))

    running = Running(Service(answer))

    def block() -> tuple[str, list[str]]:
        with Client(policy=running.address, timeout=10) as client:
            pieces = list(client.stream("hi"))
            return client.generate("hi").text, [piece.text for piece in pieces]

    text, pieces = await asyncio.to_thread(block)
    await running.stop()
    assert text == "hello"
    assert pieces == ["one"]


def test_an_unknown_role_is_refused_by_the_client() -> None:
    from thumbwheel.client import to_prompt

    with pytest.raises(errors.InvalidArgument) as caught:
        to_prompt([("user", "hi"), ("robot", "hello")])  # type: ignore[list-item]  # the point of it
    assert caught.value.field == "prompt.chat.messages[1].role"


def test_an_unknown_status_is_internal() -> None:
    class Strange(grpc.aio.AioRpcError):
        pass

    metadata = grpc.aio.Metadata()
    error = Strange(grpc.StatusCode.DATA_LOSS, metadata, metadata, details="odd")
    assert str(errors.from_rpc_error(error)) == "DATA_LOSS: odd"
