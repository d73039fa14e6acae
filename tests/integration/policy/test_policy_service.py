"""The policy service as applications meet it: the real process, real vLLM, a real broker, a tiny model."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from pathlib import Path

import pytest

from services.policy.service import prompt_sha256
from tests.integration.policy.conftest import GREEDY, World
from tests.support import Deployment, Process, until
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.client import AsyncClient, to_prompt
from thumbwheel.status import scrape
from thumbwheel.stream import topics
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.events_pb2 import GenerationEvent

pytestmark = pytest.mark.timeout(420)


async def test_a_response_has_logprobs_spans_and_a_receipt(world: World, client: AsyncClient) -> None:
    answer = await client.generate("Hello there", sampling=GREEDY, user_id="u1")
    assert len(answer.token_ids) == len(answer.logprobs) == 24
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    assert [(span.version, span.start, span.end) for span in answer.spans] == [("policy-000000", 0, 24)]
    assert all(logprob <= 0 for logprob in answer.logprobs)
    claims = ReceiptKey.load(world.deployment.home / "keys").verify(answer.receipt, field="receipt")
    assert claims.generation_id == answer.generation_id
    assert claims.prompt_id == answer.prompt_id
    assert claims.response_sha256 == hashlib.sha256(answer.text.encode()).digest()
    assert (claims.tenant, claims.version) == ("default", "policy-000000")


async def test_logprobs_are_those_of_transformers(world: World, client: AsyncClient) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompt = pb.Prompt(tokens=pb.TokenIds(ids=range(10, 40)))
    answer = await client.generate(prompt, sampling=GREEDY)
    model = AutoModelForCausalLM.from_pretrained(world.deployment.home / "store/policy-000000", dtype=torch.float32)
    ids = torch.tensor([[*range(10, 40), *answer.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, 29:-1]
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 30:, None])[:, 0]
    assert torch.allclose(torch.tensor(list(answer.logprobs)), expected, atol=0.3)  # the engine computes in bf16


async def test_pieces_of_a_stream_add_up(client: AsyncClient) -> None:
    pieces = [piece async for piece in client.stream("Tell me", sampling=GREEDY)]
    *deltas, finished = pieces
    assert isinstance(finished, pb.Generation)
    assert "".join(delta.text for delta in deltas) == finished.text
    assert [token for delta in deltas for token in delta.token_ids] == list(finished.token_ids)
    assert len(deltas) > 5
    assert finished.HasField("receipt")


async def test_candidates_share_a_prompt_and_are_reproducible(client: AsyncClient) -> None:
    sampling = pb.SamplingParams(seed=7, max_tokens=16, ignore_eos=True)
    first, second = [await client.candidates("Which?", n=3, sampling=sampling) for _ in range(2)]
    texts = [candidate.text for candidate in first.candidates]
    assert {candidate.prompt_id for candidate in first.candidates} == {first.prompt_id}
    assert len({candidate.generation_id for candidate in first.candidates}) == 3
    assert len(set(texts)) == 3
    assert texts == [candidate.text for candidate in second.candidates]


async def test_every_response_is_on_the_stream(world: World, client: AsyncClient) -> None:
    prompt = to_prompt([("system", "Be brief."), ("user", "Record me")])
    answer = await client.generate(prompt, sampling=GREEDY, user_id="u2")
    consumer = world.log.consumer([topics.GENERATIONS], group="test")
    found: list[GenerationEvent] = []

    async def arrived() -> bool:
        batch = await asyncio.to_thread(consumer.poll, 0.2)
        events = [GenerationEvent.FromString(record.value) for record in batch]
        found.extend(event for event in events if event.event_id == answer.generation_id)
        return bool(found)

    await until(arrived)
    consumer.close()
    (event,) = found
    assert event.generation == answer
    assert event.prompt == prompt
    assert (event.user_id, event.tenant, event.candidate_index, event.candidate_count) == ("u2", "default", 0, 1)
    assert event.sampling.max_tokens == 24
    assert event.sampling.top_p == 1.0  # defaults are filled in
    claims = ReceiptKey.load(world.deployment.home / "keys").verify(event.generation.receipt, field="receipt")
    assert claims.prompt_sha256 == prompt_sha256(event.prompt_token_ids)


def _chat(*turns: tuple[int, str]) -> pb.Prompt:
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns]))  # type: ignore[arg-type]  # unknown roles are the point


USER, SYSTEM, ASSISTANT = pb.ROLE_USER, pb.ROLE_SYSTEM, pb.ROLE_ASSISTANT


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        (pb.Prompt(), {}, "prompt"),
        (pb.Prompt(text="  "), {}, "prompt.text"),
        (_chat(), {}, "prompt.chat.messages"),
        (_chat((USER, "")), {}, "prompt.chat.messages[0].content"),
        (_chat((USER, "a"), (99, "b")), {}, "prompt.chat.messages[1].role"),
        (_chat((0, "a")), {}, "prompt.chat.messages[0].role"),
        (_chat((USER, "a"), (SYSTEM, "b"), (USER, "c")), {}, "prompt.chat.messages[1].role"),
        (_chat((USER, "a"), (ASSISTANT, "b")), {}, "prompt.chat.messages[1].role"),
        (pb.Prompt(tokens=pb.TokenIds(ids=[5, 99999])), {}, "prompt.tokens.ids"),
        (pb.Prompt(tokens=pb.TokenIds()), {}, "prompt.tokens.ids"),
        (pb.Prompt(text="long " * 2000), {}, "prompt"),
        (pb.Prompt(text="hi"), {"temperature": 2.5}, "sampling.temperature"),
        (pb.Prompt(text="hi"), {"temperature": float("nan")}, "sampling.temperature"),
        (pb.Prompt(text="hi"), {"top_p": 0.0}, "sampling.top_p"),
        (pb.Prompt(text="hi"), {"min_p": 1.5}, "sampling.min_p"),
        (pb.Prompt(text="hi"), {"max_tokens": 0}, "sampling.max_tokens"),
        (pb.Prompt(text="hi"), {"max_tokens": 1901}, "sampling.max_tokens"),
        (pb.Prompt(text="hi"), {"max_tokens": 4, "min_tokens": 5}, "sampling.min_tokens"),
        (pb.Prompt(text="hi"), {"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        (pb.Prompt(text="hi"), {"presence_penalty": -3.0}, "sampling.presence_penalty"),
        (pb.Prompt(text="hi"), {"stop": [""]}, "sampling.stop"),
        (pb.Prompt(text="hi"), {"stop_token_ids": [99999]}, "sampling.stop_token_ids"),
    ],
)
async def test_bad_input_names_the_field(
    client: AsyncClient, prompt: pb.Prompt, sampling: dict[str, object], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.generate(prompt, sampling=pb.SamplingParams(**sampling))  # type: ignore[arg-type]  # by name
    assert caught.value.field == field
    assert caught.value.message


async def test_candidates_are_two_to_sixteen(client: AsyncClient) -> None:
    for n in (0, 1, 17):
        with pytest.raises(errors.InvalidArgument) as caught:
            await client.candidates("Hi", n=n)
        assert caught.value.field == "n"


async def test_cancelled_streams_free_their_places(client: AsyncClient) -> None:
    """Many at once, so that none can have ended by itself."""
    sampling = pb.SamplingParams(max_tokens=1900, ignore_eos=True)
    streams = [client.stream(f"Go on for ever, {number}", sampling=sampling) for number in range(16)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    assert (await client.policy()).requests_in_flight > 0
    for stream in streams:
        await stream.aclose()

    async def free() -> bool:
        return (await client.policy()).requests_in_flight == 0

    await until(free, timeout=10)


async def test_a_deadline_is_kept(world: World) -> None:
    async with AsyncClient(policy=world.process.address, timeout=0.05) as hasty:
        with pytest.raises(errors.DeadlineExceeded):
            await hasty.generate("Too much", sampling=pb.SamplingParams(max_tokens=1900, ignore_eos=True))


async def test_metrics_are_served(world: World, client: AsyncClient) -> None:
    await client.generate("Count me", sampling=GREEDY)
    samples = await asyncio.to_thread(scrape, f"127.0.0.1:{world.process.metrics_port}")
    assert samples.total("thumbwheel_policy_tokens_total") >= 24
    assert samples.total("grpc_server_handled_total") >= 1
    assert samples.total("vllm:generation_tokens_total") >= 24


def test_no_model_is_said_plainly(world: World, processes: list[Process], tmp_path: Path) -> None:
    process = world.another(processes, "empty", Deployment(tmp_path)).start()
    assert process.popen.wait(60) == 1
    (message,) = process.errors()
    assert str(tmp_path / "store") in message
    assert "thumbwheel up" in message


def test_a_taken_port_is_said_plainly(world: World, processes: list[Process]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = world.another(processes, "taken")
        process.port = taken.getsockname()[1]
        assert process.start().popen.wait(150) == 1
    assert any(f"cannot listen on {process.address}" in message for message in process.errors())


async def test_sigterm_lets_calls_in_flight_end(world: World, client: AsyncClient) -> None:
    """Last in this file: it ends the service."""
    stream = client.stream("Let me finish", sampling=pb.SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(stream)
    world.process.popen.terminate()
    last = [piece async for piece in stream][-1]
    assert isinstance(last, pb.Generation)
    assert len(last.token_ids) == 400
    deadline = time.monotonic() + 30
    assert await asyncio.to_thread(world.process.popen.wait, 30) == 0
    assert time.monotonic() < deadline
