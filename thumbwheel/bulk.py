"""The client's side of bulk generation: what a server did not answer before it stopped goes to the next.

requests ──▶ unanswered ──▶ call ──▶ responses
                 ▲           └── it broke: a new call, with all that is not answered
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable

import grpc.aio

from thumbwheel import errors
from thumbwheel.channels import Attempts
from thumbwheel.v1.policy_pb2 import GenerateBulkRequest, GenerateBulkResponse

Call = Callable[
    [AsyncIterator[GenerateBulkRequest], float], grpc.aio.StreamStreamCall[GenerateBulkRequest, GenerateBulkResponse]
]
_MOST_UNANSWERED = 1024


class _Unanswered:
    """Requests taken from the caller, at most `_MOST_UNANSWERED` at a time, until they are answered."""

    def __init__(self) -> None:
        self._requests: dict[str, GenerateBulkRequest] = {}
        self._added, self._answered = asyncio.Event(), asyncio.Event()
        self._complete = False

    async def take(self, requests: AsyncIterable[GenerateBulkRequest]) -> None:
        """Takes all, as there is room. Raises `errors.InvalidArgument` for an id that is in use."""
        try:
            async for request in requests:
                if request.request_id in self._requests:
                    raise errors.InvalidArgument(f"{request.request_id!r} is in use.", field="request_id")
                while len(self._requests) >= _MOST_UNANSWERED:
                    self._answered.clear()
                    await self._answered.wait()
                self._requests[request.request_id] = request
                self._added.set()
        finally:
            self._complete = True
            self._added.set()

    def answered(self, request_id: str) -> bool:
        """Notes an answer. False for a second one."""
        self._answered.set()
        return self._requests.pop(request_id, None) is not None

    async def feed(self) -> AsyncIterator[GenerateBulkRequest]:
        """All that is not answered, each once, until there will be no more."""
        sent: set[str] = set()
        while True:
            self._added.clear()
            sent &= self._requests.keys()
            for request_id, request in list(self._requests.items()):
                if request_id not in sent:
                    sent.add(request_id)
                    yield request
            if self._complete and sent >= self._requests.keys():
                return
            await self._added.wait()


async def responses(
    open_call: Call, requests: AsyncIterable[GenerateBulkRequest], *, timeout: float
) -> AsyncGenerator[GenerateBulkResponse, None]:
    """What comes of each request, once, in any order. `open_call` takes the requests and the seconds left.

    Raises `errors.InvalidArgument` where two unanswered requests have one id, what `requests` raises, and our errors.
    """
    unanswered = _Unanswered()
    taking = asyncio.create_task(unanswered.take(requests), name="bulk-requests")
    attempts = Attempts(timeout)
    try:
        while True:
            call = open_call(unanswered.feed(), attempts.left)
            try:
                async for response in call:
                    if unanswered.answered(response.request_id):
                        attempts.reset()
                        yield response
                break
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                await attempts.again(error)
            finally:
                call.cancel()
        await taking
    finally:
        taking.cancel()
        await asyncio.wait([taking])
