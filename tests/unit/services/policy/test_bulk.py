"""Generating in bulk: yields to people, answers everything once, and lets one refusal be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.policy.bulk import Bulk
from services.policy.generating import Asked
from thumbwheel import errors
from thumbwheel.v1 import policy_pb2 as pb


class Engine:
    """Stands for `Generating`: what it has in it ends when it is told."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.most = 0
        self.changed = asyncio.Condition()

    def check(self, prompt: pb.Prompt, given: pb.SamplingParams, **rest: Any) -> Asked:
        if not prompt.text:
            raise errors.InvalidArgument("is missing.", field="prompt")
        assert rest["bulk"]
        return Asked(rest["tenant"], "", prompt, f"p-{prompt.text}", [1], given, rest["count"], bulk=True)

    async def all(self, asked: Asked) -> list[pb.Generation]:
        end = self.running[asked.prompt.text] = asyncio.Event()
        self.most = max(self.most, len(self.running))
        await self._tell()
        try:
            await end.wait()
        finally:
            del self.running[asked.prompt.text]
        await self._tell()
        return [pb.Generation(text=f"{asked.prompt.text}{i}") for i in range(asked.candidate_count)]

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until_running(self, *names: str) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: sorted(self.running) == sorted(names))


def _request(name: str, n: int = 0) -> pb.GenerateBulkRequest:
    return pb.GenerateBulkRequest(request_id=name, prompt=pb.Prompt(text=name), n=n)


async def _each(*requests: pb.GenerateBulkRequest) -> AsyncIterator[pb.GenerateBulkRequest]:
    for request in requests:
        yield request


def _bulk(engine: Engine, people: list[int], slots: int = 4) -> Bulk:
    return Bulk(engine, slots=slots, people=lambda: people[0])  # type: ignore[arg-type]  # it is used as one


async def _collect(stream: AsyncIterator[pb.GenerateBulkResponse]) -> list[pb.GenerateBulkResponse]:
    return [response async for response in stream]


async def _settle() -> None:
    """Lets everything happen that can: there is nothing to wait for where nothing is to happen."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_responses_come_as_they_are_finished() -> None:
    engine = Engine()
    stream = _bulk(engine, [0]).serve(_each(_request("a", 2), _request("b")), tenant="t")
    first = asyncio.ensure_future(anext(stream))
    await engine.until_running("a", "b")
    engine.running["b"].set()
    assert (await first).request_id == "b"
    engine.running["a"].set()
    (rest,) = await _collect(stream)
    assert (rest.request_id, rest.prompt_id) == ("a", "p-a")
    assert [generation.text for generation in rest.generations] == ["a0", "a1"]


async def test_people_take_its_room_but_never_all_of_it() -> None:
    engine, people = Engine(), [0]
    bulk = _bulk(engine, people)
    collecting = asyncio.ensure_future(_collect(bulk.serve(_each(*map(_request, "abcdef")), tenant="t")))
    await engine.until_running("a", "b", "c", "d")
    people[0] = 50
    for name in "abc":
        engine.running[name].set()
    await _settle()
    assert (sorted(engine.running), bulk.running) == (["d"], 1)
    engine.running["d"].set()
    await _settle()
    assert sorted(engine.running) == ["e"]  # one goes on, however many people there are
    people[0] = 0
    engine.running["e"].set()
    await engine.until_running("f")
    engine.running["f"].set()
    assert sorted(response.request_id for response in await collecting) == list("abcdef")
    assert engine.most == 4
    assert bulk.running == 0


async def test_a_refusal_is_of_one_request_only() -> None:
    engine = Engine()
    bad = pb.GenerateBulkRequest(request_id="bad", prompt=pb.Prompt())
    requests = _each(bad, _request("many", 5), _request(""), _request("x" * 129), _request("good"))
    collecting = asyncio.ensure_future(_collect(_bulk(engine, [0]).serve(requests, tenant="t")))
    await engine.until_running("good")
    engine.running["good"].set()
    answers = {response.request_id: response for response in await collecting}
    assert [(answers[name].error.code, answers[name].error.field) for name in ("bad", "many", "", "x" * 128)] == [
        ("INVALID_ARGUMENT", "prompt"),
        ("INVALID_ARGUMENT", "n"),
        ("INVALID_ARGUMENT", "request_id"),
        ("INVALID_ARGUMENT", "request_id"),
    ]
    assert not answers["good"].HasField("error")


async def test_requests_are_taken_no_faster_than_responses_are_read() -> None:
    taken: list[str] = []

    async def endless() -> AsyncIterator[pb.GenerateBulkRequest]:
        number = 0
        while True:
            taken.append(str(number))
            yield _request(str(number))
            number += 1

    engine = Engine()
    stream = _bulk(engine, [0]).serve(endless(), tenant="t")
    first = asyncio.ensure_future(anext(stream))
    await engine.until_running("0", "1", "2", "3")
    for event in list(engine.running.values()):
        event.set()
    await first
    await _settle()
    assert (len(taken), engine.running) == (5, {})  # four answered and one waiting, though nothing runs any more
    await anext(stream)
    await engine.until_running("4")
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
    await engine.until_running()


async def test_a_stream_that_is_left_frees_its_room() -> None:
    engine = Engine()
    bulk = _bulk(engine, [0])
    leaving = asyncio.ensure_future(_collect(bulk.serve(_each(*map(_request, "abcdef")), tenant="t")))
    await engine.until_running("a", "b", "c", "d")
    leaving.cancel()
    await asyncio.wait([leaving])
    assert (bulk.running, engine.running) == (0, {})


async def test_a_server_that_stops_answers_what_it_has_taken() -> None:
    async def two_and_no_end() -> AsyncIterator[pb.GenerateBulkRequest]:
        yield _request("a")
        yield _request("b")
        await asyncio.Event().wait()

    engine, answered = Engine(), []
    bulk = _bulk(engine, [0])

    async def collect() -> None:
        async for response in bulk.serve(two_and_no_end(), tenant="t"):
            answered.append(response.request_id)

    collecting = asyncio.ensure_future(collect())
    await engine.until_running("a", "b")
    bulk.stop()
    for event in list(engine.running.values()):
        event.set()
    with pytest.raises(errors.Unavailable, match="stopping"):
        await asyncio.wait_for(collecting, 10)
    assert sorted(answered) == ["a", "b"]


async def test_a_fault_of_the_engine_ends_the_stream() -> None:
    engine = Engine()

    async def broken(asked: Asked) -> list[pb.Generation]:
        raise RuntimeError("the engine died")

    engine.all = broken  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(_collect(_bulk(engine, [0]).serve(_each(_request("a")), tenant="t")), 10)
    assert caught.group_contains(RuntimeError, match="the engine died")
