"""Generating in bulk, for training: takes what people leave.

    requests ──▶ wait for room ──▶ engine, behind people's requests ──▶ responses, as they finish

Room is a quarter of the engine's slots, less what people have in flight, and never none: a rollout is slowed by people,
and not stopped. A request is read from the stream only when there is room for it, so gRPC's flow control holds up
whoever sends faster; a stream whose responses are not read holds up only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from prometheus_client import Gauge

from services.policy.generating import Asked, Generating
from thumbwheel import errors
from thumbwheel.v1 import policy_pb2 as pb

RUNNING = Gauge("thumbwheel_policy_bulk_running", "Responses being generated in bulk.")
MAX_PER_PROMPT = 16
MAX_REQUEST_ID = 128


class Bulk:
    """The streams of bulk generation of one server. `people` says how many requests of people are in flight."""

    def __init__(self, generating: Generating, *, slots: int, people: Callable[[], int]) -> None:
        self._generating, self.slots, self._people = generating, slots, people
        self.running = 0
        self._changed = asyncio.Condition()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Takes no more requests. What has been taken is answered, and the streams end with `errors.Unavailable`."""
        self._stopping.set()

    async def serve(
        self, requests: AsyncIterator[pb.GenerateBulkRequest], *, tenant: str
    ) -> AsyncIterator[pb.GenerateBulkResponse]:
        """What comes of each request, as it is finished. Ends when `requests` has ended and all are answered.

        Raises `errors.Unavailable` where `stop` was called: what is not answered then is for another server.
        """
        finished: asyncio.Queue[pb.GenerateBulkResponse | None] = asyncio.Queue()
        unread = asyncio.Semaphore(self.slots)

        async def answer(request: pb.GenerateBulkRequest) -> None:
            finished.put_nowait(await self._one(request, tenant))

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for request in self._until_stopped(requests):
                        await unread.acquire()
                        group.create_task(answer(request))
                if self._stopping.is_set():
                    raise errors.Unavailable("The server is stopping.", remedy="Send what is not answered again.")
            finally:
                finished.put_nowait(None)

        reading = asyncio.create_task(read(), name="bulk")
        try:
            while (response := await finished.get()) is not None:
                yield response
                unread.release()
            await reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _until_stopped(
        self, requests: AsyncIterator[pb.GenerateBulkRequest]
    ) -> AsyncIterator[pb.GenerateBulkRequest]:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while True:
                coming = asyncio.ensure_future(anext(requests, None))
                try:
                    await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not coming.done():
                        coming.cancel()
                if stopping.done() or (request := coming.result()) is None:
                    return
                yield request
        finally:
            stopping.cancel()

    async def _one(self, request: pb.GenerateBulkRequest, tenant: str) -> pb.GenerateBulkResponse:
        """A refusal is the answer to its request, and no matter of the others."""
        response = pb.GenerateBulkResponse(request_id=request.request_id[:MAX_REQUEST_ID])
        try:
            asked = self._check(request, tenant)
            response.prompt_id = asked.prompt_id
            async with self._room(asked.candidate_count):
                response.generations.extend(await self._generating.all(asked))
        except errors.ThumbwheelError as error:
            response.error.code = error.code.name
            response.error.field = error.field if isinstance(error, errors.InvalidArgument) else ""
            response.error.message = str(error)
        return response

    def _check(self, request: pb.GenerateBulkRequest, tenant: str) -> Asked:
        if not 1 <= len(request.request_id) <= MAX_REQUEST_ID:
            raise errors.InvalidArgument(f"must have 1 to {MAX_REQUEST_ID} characters.", field="request_id")
        most = min(MAX_PER_PROMPT, self.slots)
        if request.n > most:
            raise errors.InvalidArgument(f"is {request.n}; at most {most} are allowed.", field="n")
        return self._generating.check(
            request.prompt,
            request.sampling,
            tenant=tenant,
            version=request.version,
            count=max(1, request.n),
            bulk=True,
        )

    @contextlib.asynccontextmanager
    async def _room(self, count: int) -> AsyncIterator[None]:
        async with self._changed:
            # Whoever runs, wakes those who wait when it ends; where nobody runs, nobody waits.
            await self._changed.wait_for(
                lambda: self.running == 0 or self.running + count <= self.slots - self._people()
            )
            self.running += count
        RUNNING.inc(count)
        try:
            yield
        finally:
            RUNNING.dec(count)
            async with self._changed:
                self.running -= count
                self._changed.notify_all()
