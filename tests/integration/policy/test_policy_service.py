"""The policy service as applications meet it: the real process, real vLLM, a real broker, a tiny model."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.policy.generating import prompt_sha256
from tests.support import Deployment, Process, announce, free_port, until
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.client import AsyncClient, to_prompt
from thumbwheel.status import scrape
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log, Producer
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

pytestmark = pytest.mark.timeout(420)
POLICY = ModelRole.MODEL_ROLE_POLICY
GREEDY = pb.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass
class World:
    """A broker, a store, and a policy service that follows it."""

    deployment: Deployment
    bootstrap_servers: str
    log: Log
    producer: Producer
    process: Process

    def another(self, processes: list[Process], name: str, deployment: Deployment | None = None) -> Process:
        """A policy process not yet started, for the same broker."""
        home = (deployment or self.deployment).home
        arguments = ["--home", str(home), "--bootstrap-servers", self.bootstrap_servers, "--max-model-len", "2048"]
        process = Process("services.policy", [*arguments, "--max-tokens", "1900"], home / f"{name}.log")
        processes.append(process)
        return process

    def go_live(self, manifest: CheckpointManifest) -> None:
        """Announces a version."""
        announce(self.producer, manifest, self.deployment.store.load(manifest.version).manifest_sha256)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, processes: list[Process]) -> Iterator[World]:
    """Policy-000000 is live."""
    deployment = Deployment(tmp_path_factory.mktemp("home"))
    deployment.publish(POLICY, 0, seed=0)
    with EmbeddedBroker(port=free_port(), log=deployment.home / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=2, replication=1), 30.0)
        producer = log.producer()
        world = World(deployment, broker.bootstrap_servers, log, producer, None)  # type: ignore[arg-type]  # set on the next line
        world.process = world.another(processes, "policy").start().wait_serving()
        yield world
        producer.close(5)
        log.close()


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncClient]:
    """Talks to the service."""
    async with AsyncClient(policy=world.process.address, timeout=60.0) as client:
        yield client


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


async def test_every_response_is_on_the_stream(world: World) -> None:
    prompt = to_prompt([("system", "Be brief."), ("user", "Record me")])
    async with AsyncClient(policy=world.process.address, timeout=60.0, consent=False) as client:
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
    assert (event.HasField("consent"), event.consent) == (True, False)
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


async def _greedy(client: AsyncClient) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of a few prompts, one at a time, so that batching cannot differ."""
    answers = [await client.generate(f"Question number {i}", sampling=GREEDY) for i in range(6)]
    return [(list(answer.token_ids), list(answer.logprobs)) for answer in answers]


async def _live(client: AsyncClient, version: str) -> None:
    async def live() -> bool:
        return (await client.policy()).version == version

    await until(live)


async def test_a_swap_is_true(world: World, client: AsyncClient, processes: list[Process]) -> None:
    """After it, tokens and log-probabilities are those of a cold start; a response it cut in two goes on as if the new
    weights had read it from the start."""
    before = await _greedy(client)
    prompt_ids = list(range(20, 60))
    long = pb.SamplingParams(temperature=0.0, max_tokens=1900, ignore_eos=True)
    new = world.deployment.publish(POLICY, 1, seed=1)
    announcing = asyncio.create_task(asyncio.to_thread(world.go_live, new))
    finished = None
    while finished is None or {span.version for span in finished.spans} == {"policy-000000"}:
        # One after the other, until the swap cuts one in two.
        finished = await client.generate(pb.Prompt(tokens=pb.TokenIds(ids=prompt_ids)), sampling=long)
    await announcing
    await _live(client, "policy-000001")
    after = await _greedy(client)
    assert after != before

    cold = world.another(processes, "cold").start().wait_serving()
    async with AsyncClient(policy=cold.address) as cold_client:
        assert (await cold_client.policy()).version == "policy-000001"
        assert await _greedy(cold_client) == after
        assert [span.version for span in finished.spans] == ["policy-000000", "policy-000001"]
        cut = finished.spans[0].end
        assert 0 < cut < 1900
        prefix = pb.Prompt(tokens=pb.TokenIds(ids=[*prompt_ids, *finished.token_ids[:cut]]))
        rest = pb.SamplingParams(temperature=0.0, max_tokens=1900 - cut, ignore_eos=True)
        continued = await cold_client.generate(prefix, sampling=rest)
        assert list(continued.token_ids) == list(finished.token_ids[cut:])
    assert cold.stop() == 0


async def test_a_seeded_response_survives_a_swap_in_mid_prompt(world: World, client: AsyncClient) -> None:
    """Many long prompts at once are computed in pieces; each has a generator of its own."""
    sequence = int((await client.policy()).version[-6:])
    new = world.deployment.publish(POLICY, sequence + 1, seed=55)
    text = pb.Prompt(text="so it goes " * 120)

    async def one(seed: int) -> pb.Generation:
        return await client.generate(text, sampling=pb.SamplingParams(seed=seed, max_tokens=100, ignore_eos=True))

    async with asyncio.TaskGroup() as group:
        first = [group.create_task(one(seed)) for seed in range(32)]
        world.go_live(new)
    await _live(client, new.version)
    assert all(len(task.result().token_ids) == 100 for task in first)
    # One at a time, with the prompt in the cache: in a batch of another size, bf16 rounds otherwise.
    again = [[(await one(seed)).text for seed in (0, 1, 2, 3)] for _ in range(3)]
    assert again[1] == again[2]
    assert len(set(again[1])) == 4


async def test_swaps_under_load_fail_nothing(world: World, client: AsyncClient) -> None:
    """Sixteen streams at a time, ten swaps; no request fails, and every token says which version made it."""
    start = int((await client.policy()).version[-6:])
    versions = [world.deployment.publish(POLICY, start + 1 + i, seed=100 + i) for i in range(10)]
    stop = asyncio.Event()
    finished: list[pb.Generation] = []

    async def user(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            sampling = pb.SamplingParams(max_tokens=200, ignore_eos=True, seed=number * 1000 + turn)
            pieces = [piece async for piece in client.stream(f"I am user {number}", sampling=sampling)]
            last = pieces[-1]
            assert isinstance(last, pb.Generation)
            finished.append(last)

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(user(number))

        async def busy() -> bool:
            return (await client.policy()).requests_in_flight == 16

        for manifest in versions:
            await until(busy)
            world.go_live(manifest)
            await _live(client, manifest.version)
        stop.set()
    crossed = 0
    for generation in finished:
        assert len(generation.token_ids) == len(generation.logprobs) == 200
        assert [span.start for span in generation.spans] == [0, *(span.end for span in generation.spans[:-1])]
        assert generation.spans[-1].end == 200
        names = [span.version for span in generation.spans]
        assert names == sorted(set(names))
        crossed += len(names) > 1
    assert crossed >= 10
    swaps = (await client.policy()).swaps[-10:]
    assert [swap.version for swap in swaps] == [manifest.version for manifest in versions]
    assert {swap.outcome for swap in swaps} == {pb.SWAP_OUTCOME_LIVE}


async def test_a_version_that_is_not_what_it_says_is_refused(world: World, client: AsyncClient) -> None:
    sequence = int((await client.policy()).version[-6:])
    before = await _greedy(client)
    bad = world.deployment.publish(POLICY, sequence + 1, seed=900)
    digest = world.deployment.store.load(bad.version).manifest_sha256
    weights = world.deployment.home / "store" / bad.version / "model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1000])
    announce(world.producer, bad, digest)
    good = world.deployment.publish(POLICY, sequence + 2, seed=901)

    def refused() -> bool:
        return any(bad.version in message for message in world.process.errors())

    async def said() -> bool:
        return refused()

    await until(said)
    assert (await client.policy()).version != bad.version
    assert await _greedy(client) == before
    world.go_live(good)
    await _live(client, good.version)


async def test_an_undecodable_announcement_goes_to_the_dead_letters(world: World, client: AsyncClient) -> None:
    world.producer.send(topics.VERSIONS, b"policy", b"\xff\xff not a version").result(30)
    consumer = world.log.consumer([topics.DEADLETTER], group="test")
    letters: list[bytes] = []

    async def arrived() -> bool:
        letters.extend(record.value for record in await asyncio.to_thread(consumer.poll, 0.2))
        return bool(letters)

    await until(arrived)
    consumer.close()
    assert b"\xff\xff not a version" in letters[0]
    sequence = int((await client.policy()).version[-6:]) + 1
    manifest = world.deployment.publish(POLICY, sequence, seed=77)
    world.go_live(manifest)
    await _live(client, manifest.version)


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
        assert process.start().popen.wait(60) == 1
    assert any(f"cannot listen on {process.address}" in message for message in process.errors())


async def test_sigterm_lets_calls_in_flight_end(world: World, client: AsyncClient) -> None:
    """Last in this file: it ends the service."""
    stream = client.stream("Let me finish", sampling=pb.SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(stream)
    said = len(world.process.log.read_text())
    world.process.popen.terminate()
    last = [piece async for piece in stream][-1]
    assert isinstance(last, pb.Generation)
    assert len(last.token_ids) == 400
    deadline = time.monotonic() + 30
    assert await asyncio.to_thread(world.process.popen.wait, 30) == 0
    assert time.monotonic() < deadline
    assert "ERROR" not in world.process.log.read_text()[said:], "vLLM takes an engine's end for a fault"
