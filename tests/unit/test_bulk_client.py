"""Bulk generation from the client: each request is answered once, whatever befalls the servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.servers import Running, Service
from thumbwheel import bulk, channels, errors
from thumbwheel.channels import call_error
from thumbwheel.client import AsyncClient
from thumbwheel.v1 import policy_pb2 as pb


async def _each(count: int, *, then: BaseException | None = None) -> AsyncIterator[pb.GenerateBulkRequest]:
    for number in range(count):
        yield pb.GenerateBulkRequest(request_id=str(number))
    if then is not None:
        raise then


def _breaking(every: int) -> Service:
    """Breaks a call after so many answers, the last of which is lost or not, as it happens."""
    answered = 0

    async def answer() -> pb.GenerateResponse:
        nonlocal answered
        answered += 1
        if answered % every == 0:
            raise errors.Unavailable("The server is stopping.")
        return pb.GenerateResponse()

    return Service(answer)


async def test_all_are_answered_once_though_calls_break() -> None:
    running = Running(_breaking(every=7))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        answers = [response.request_id async for response in client.bulk(_each(40), timeout=60)]
    await running.stop()
    assert sorted(answers, key=int) == [str(number) for number in range(40)]


async def test_requests_are_taken_only_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_MOST_UNANSWERED", 3)
    stuck, taken = asyncio.Event(), []

    async def answer() -> pb.GenerateResponse:
        await stuck.wait()
        return pb.GenerateResponse()

    async def counted() -> AsyncIterator[pb.GenerateBulkRequest]:
        async for request in _each(50):
            taken.append(request.request_id)
            yield request

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        stream = client.bulk(counted(), timeout=60)
        assert (await anext(stream)).request_id == "0"
        assert len(taken) <= 5
        stuck.set()
        assert len([response async for response in stream]) == 49
    await running.stop()


@pytest.mark.parametrize("fault", [KeyError("mine"), None])
async def test_faults_of_the_caller_come_back_to_it(fault: BaseException | None) -> None:
    async def twice() -> AsyncIterator[pb.GenerateBulkRequest]:
        stuck = asyncio.Event()
        for name in ("a", "a"):
            yield pb.GenerateBulkRequest(request_id=name)
        await stuck.wait()

    async def answer() -> pb.GenerateResponse:
        await asyncio.sleep(0)
        return pb.GenerateResponse()

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        expected = KeyError if fault is not None else errors.InvalidArgument
        requests = _each(3, then=fault) if fault is not None else twice()
        with pytest.raises(expected):
            [response async for response in client.bulk(requests, timeout=20)]
    await running.stop()


async def test_an_error_that_does_not_pass_ends_it() -> None:
    async def answer() -> pb.GenerateResponse:
        raise errors.FailedPrecondition("Not here.")

    running = Running(Service(answer))
    async with AsyncClient(policy=running.address, timeout=10) as client:
        with pytest.raises(errors.FailedPrecondition, match="Not here"):
            [response async for response in client.bulk(_each(3), timeout=20)]
    await running.stop()


async def test_a_call_that_cancels_itself_is_no_cancellation_of_its_caller() -> None:
    """As grpc.aio says of a call that breaks while a request is being sent."""
    error = asyncio.CancelledError()
    assert isinstance(call_error(error), errors.Unavailable)

    async def cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as mine:
            raise call_error(mine) from mine

    task = asyncio.create_task(cancelled())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_all_attempts_outlast_a_pause_between_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a call may find that a server that is back is away: gRPC connects anew only once its pause is over."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    monkeypatch.setattr("random.uniform", lambda least, most: least)
    attempts = channels.Attempts(60.0)
    away = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "refused")
    for _ in range(channels._ATTEMPTS - 1):
        await attempts.again(away)
    with pytest.raises(errors.Unavailable):
        await attempts.again(away)
    jitter = 1.2  # of gRPC's
    assert sum(pauses) > jitter * int(dict(channels._OPTIONS)["grpc.max_reconnect_backoff_ms"]) / 1000
