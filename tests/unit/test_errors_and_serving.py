"""Errors cross the wire and come back as themselves; a server lives and dies as it should."""

from __future__ import annotations

import asyncio
import multiprocessing
import time

import grpc
import grpc.aio
import pytest

from tests.servers import Running, Service
from thumbwheel import calls, errors, serving
from thumbwheel.client import AsyncClient, Client
from thumbwheel.v1 import policy_pb2 as pb

RAISED = [
    errors.InvalidArgument("is 3.", field="sampling.temperature", remedy="Lower it."),
    errors.NotFound("No such thing."),
    errors.Conflict("Used before."),
    errors.Unauthenticated("Who are you?"),
    errors.PermissionDenied("Forged."),
    errors.FailedPrecondition("Not now.", remedy="Type `thumbwheel up`."),
    errors.CorruptCheckpoint("model.safetensors is short."),
    errors.NoSpace("The disk is full.", remedy="Free some."),
    errors.ResourceExhausted("Too much.", retry_after=60.5),  # later than the deadline: not waited for
    errors.DeadlineExceeded("Too long."),
    errors.Internal("Ours."),
]


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
        with pytest.raises(errors.PortInUse, match=first.address):
            serving.check_port("second", first.address)
        serving.check_port("second", "127.0.0.1:0")
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


async def test_sigterm_lets_streams_end_and_turns_new_calls_away() -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def answer() -> pb.GenerateResponse:
        inside.set()
        await go_on.wait()
        return pb.GenerateResponse()

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        streams = [client.stream("hi") for _ in range(8)]
        assert [(await anext(stream)).text for stream in streams] == ["one"] * 8
        await inside.wait()
        stopping = asyncio.create_task(running.stop())

        async with AsyncClient(policy=running.address, timeout=0.5) as late:

            async def calls_for_ever() -> None:
                while True:
                    assert (await late.policy()).version == "policy-000000"

            with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
                await calls_for_ever()
        go_on.set()
        assert [[piece.text async for piece in stream] for stream in streams] == [[]] * 8
        await stopping


def _failing(error: errors.ThumbwheelError, *, times: int) -> tuple[Service, list[float]]:
    """A service that fails so many times and then answers "done", and when it was called."""
    called: list[float] = []

    async def answer() -> pb.GenerateResponse:
        called.append(time.monotonic())
        if len(called) <= times:
            raise error
        return pb.GenerateResponse(generation=pb.Generation(text="done"))

    return Service(answer), called


async def test_the_client_tries_again_while_the_server_is_away() -> None:
    service, called = _failing(errors.Unavailable("Not yet."), times=2)
    running = Running(service)
    async with AsyncClient(policy=running.address, timeout=10) as client:
        assert (await client.generate("hi")).text == "done"
    await running.stop()
    assert len(called) == 3


async def test_the_client_comes_again_when_it_is_told_to() -> None:
    service, called = _failing(errors.ResourceExhausted("Too much.", retry_after=0.4), times=1)
    running = Running(service)
    async with AsyncClient(policy=running.address, timeout=10) as client:
        assert (await client.generate("hi")).text == "done"
    await running.stop()
    assert len(called) == 2
    assert called[1] - called[0] >= 0.4


async def test_only_the_deadline_ends_what_the_server_asks_for() -> None:
    service, called = _failing(errors.ResourceExhausted("Too much.", retry_after=0.01), times=8)
    running = Running(service)
    async with AsyncClient(policy=running.address, timeout=20) as client:
        assert (await client.generate("hi")).text == "done"
    await running.stop()
    assert len(called) == 9


async def test_attempts_end_with_the_deadline_and_say_why() -> None:
    service, called = _failing(errors.ResourceExhausted("Too much.", retry_after=0.3), times=99)
    running = Running(service)
    async with AsyncClient(policy=running.address, timeout=0.8) as client:
        with pytest.raises(errors.ResourceExhausted, match="Too much"):
            await client.generate("hi")
    await running.stop()
    assert len(called) in (1, 2, 3)


async def test_a_stream_is_not_begun_anew_once_something_was_shown() -> None:
    service, called = _failing(errors.Unavailable("Gone."), times=1)
    running = Running(service)
    async with AsyncClient(policy=running.address, timeout=10) as client:
        stream = client.stream("hi")
        shown = [(await anext(stream)).text]
        with pytest.raises(errors.Unavailable, match="Gone"):
            await anext(stream)
    await running.stop()
    assert shown == ["one"]
    assert len(called) == 1


async def test_a_call_on_behalf_of_another_ends_with_it() -> None:
    async def answer() -> pb.GenerateResponse:
        left.append(calls.remaining())
        await asyncio.Event().wait()
        raise AssertionError

    left: list[float | None] = []
    running = Running(Service(answer))

    async def behalf() -> None:
        calls.enter(calls.Caller("acme"), 0.5)
        async with AsyncClient(policy=running.address, timeout=60) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await client.generate("hi")
            with pytest.raises(errors.DeadlineExceeded, match="on whose behalf"):
                await client.generate("hi")

    await asyncio.wait_for(asyncio.create_task(behalf()), 10)
    await running.stop()
    assert left[0] is not None
    assert 0 < left[0] <= 0.5


async def test_connections_are_pooled() -> None:
    peers: set[str] = set()

    class Curious(Service):
        async def Generate(
            self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
        ) -> pb.GenerateResponse:
            peers.add(context.peer())
            return await self.answer()

    async def answer() -> pb.GenerateResponse:
        return pb.GenerateResponse()

    running = Running(Curious(answer))
    async with AsyncClient(policy=running.address, timeout=10, connections=3) as client:
        for _ in range(9):
            await client.generate("hi")
    await running.stop()
    assert len(peers) == 3


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


@pytest.mark.parametrize(
    "error",
    [
        errors.NoSpace("The disk is full.", remedy="Free some."),
        errors.InvalidArgument("is empty.", field="feedback.user_id"),
        errors.ResourceExhausted("Too many.", retry_after=1.5, remedy="Wait."),
    ],
)
def test_an_error_is_the_same_in_another_process(error: errors.ThumbwheelError) -> None:
    there, here = multiprocessing.Pipe()
    there.send(error)
    restored = here.recv()
    assert (type(restored), str(restored), vars(restored)) == (type(error), str(error), vars(error))


def test_an_unknown_status_is_internal() -> None:
    class Strange(grpc.aio.AioRpcError):
        pass

    metadata = grpc.aio.Metadata()
    error = Strange(grpc.StatusCode.DATA_LOSS, metadata, metadata, details="odd")
    assert str(errors.from_rpc_error(error)) == "DATA_LOSS: odd"
