"""Swaps of a real engine: what a probe computes, and that after whatever fails the old weights are back to the bit.

And, since the engine is there: that a call which its client cancels makes room at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from services.admission import Admission
from services.config import EngineSettings
from services.engine import Engine
from services.policy.bulk import Bulk
from services.policy.generating import Generating, Limits
from services.policy.service import PolicyService
from services.prompts import PromptEncoder
from tests.support import Deployment, make_tiny_llama, probe_of
from thumbwheel.auth import ReceiptKey
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.policy_pb2 import SwapOutcome
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceStub, add_PolicyServiceServicer_to_server
from thumbwheel.v1.rollout_pb2 import ModelRole, Probe

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("default"),  # vLLM's, which is imported into this process here
]
POLICY, REWARD = ModelRole.MODEL_ROLE_POLICY, ModelRole.MODEL_ROLE_REWARD
LIVE, ROLLED_BACK = SwapOutcome.SWAP_OUTCOME_LIVE, SwapOutcome.SWAP_OUTCOME_ROLLED_BACK
REFUSED = SwapOutcome.SWAP_OUTCOME_REFUSED

SLOTS = 8

Answers = list[tuple[list[int], list[float]]]


@dataclass
class World:
    """An engine on version 0 of three that fit it, each with its probe."""

    engine: Engine
    versions: list[VerifiedVersion]

    async def on(self, index: int) -> None:
        """Makes a version live, where it is not."""
        if self.engine.version != self.versions[index].manifest.version:
            assert (await self.engine.swap(self.versions[index])).outcome == LIVE

    async def answer(self, prompt: list[int], name: str, **params: Any) -> Any:
        """A response, whole."""
        import vllm

        prompts = vllm.TokensPrompt(prompt_token_ids=prompt)
        sampling = vllm.SamplingParams(**{"temperature": 0.0, "logprobs": 0, "ignore_eos": True, **params})
        return [output async for output in self.engine.llm.generate(prompts, sampling, name)][-1]

    async def answers(self) -> Answers:
        """Tokens and log-probabilities of a few prompts, one at a time, so that batching cannot differ."""
        found = []
        for number in range(4):
            output = (await self.answer([5 + number, 9, 40], f"check-{number}", max_tokens=20)).outputs[0]
            ids = list(output.token_ids)
            found.append((ids, [step[i].logprob for i, step in zip(ids, output.logprobs, strict=True)]))
        return found


def publish(deployment: Deployment, folder: Path, role: ModelRole.ValueType) -> list[VerifiedVersion]:
    """Three versions with probes."""
    reward, versions = role == REWARD, []
    for number in range(3):
        model = make_tiny_llama(folder / str(number), seed=number, reward=reward)
        manifest = deployment.publish_copy(role, number, model, probes=[probe_of(model, reward=reward)])
        versions.append(deployment.store.load(manifest.version))
    return versions


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A policy. Functions may be sent to its workers, which is how they are sabotaged."""
    home = tmp_path_factory.mktemp("home")
    versions = publish(Deployment(home), tmp_path_factory.mktemp("models"), POLICY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        engine = await Engine.start(versions[0], EngineSettings(home=home, max_num_seqs=SLOTS), pooling=False)
        yield World(engine, versions)
        await engine.close()


def with_probe(version: VerifiedVersion, probe: Probe) -> VerifiedVersion:
    """A version whose manifest tells of something else."""
    changed = type(version.manifest)()
    changed.CopyFrom(version.manifest)
    del changed.probes[:]
    changed.probes.append(probe)
    return replace(version, manifest=changed)


async def test_a_probe_is_what_a_request_would_be_told(world: World) -> None:
    await world.on(0)
    probe = world.versions[0].manifest.probes[0]
    prompt, continuation = list(probe.prompt_token_ids), list(probe.token_ids)
    await world.engine.llm.pause_generation(mode="keep", clear_cache=True)
    (found,) = await world.engine.llm.collective_rpc("probe_logprobs", args=(prompt, continuation))
    await world.engine.llm.resume_generation()
    output = await world.answer([*prompt, *continuation], "told", max_tokens=1, prompt_logprobs=0)
    told = [
        step[token].logprob for token, step in zip(continuation, output.prompt_logprobs[len(prompt) :], strict=True)
    ]
    assert found == pytest.approx(told, abs=1e-6)
    assert found == pytest.approx(list(probe.logprobs), abs=0.3)  # both compute in bf16
    assert max(found) - min(found) > 1.0


async def test_requests_in_flight_go_on_around_a_probe(world: World) -> None:
    """A probe takes a place in the batch, and leaves no trace there."""
    await world.on(0)
    alone = await world.answer([7, 8, 9], "alone", max_tokens=120)
    begun = asyncio.create_task(world.answer([7, 8, 9], "met", max_tokens=120))
    for _ in range(3):
        await world.engine.llm.pause_generation(mode="keep", clear_cache=True)
        await world.engine.llm.collective_rpc("probe_logprobs", args=([3, 4], [5, 6]))
        await world.engine.llm.resume_generation()
    assert (await begun).outputs[0].token_ids == alone.outputs[0].token_ids


async def test_a_swap_and_the_way_back_are_exact(world: World) -> None:
    await world.on(0)
    old = await world.answers()
    await world.on(1)
    assert await world.answers() != old
    assert world.engine.previous is world.versions[0]
    assert (await world.engine.rollback()).outcome == LIVE
    assert await world.answers() == old


def in_place(worker: Any, whether: bool) -> None:
    """Runs in the worker: weights are replaced in place, as on a GPU."""
    if whether:
        worker.stage = lambda weights_path: False
    else:
        del worker.stage


@asynccontextmanager
async def replaced_in_place(world: World) -> AsyncIterator[None]:
    """Swaps inside find workers that make nothing ready beforehand."""
    await world.engine.llm.collective_rpc(in_place, args=(True,))
    try:
        yield
    finally:
        await world.engine.llm.collective_rpc(in_place, args=(False,))


async def test_weights_compute_the_same_whichever_way_they_came(world: World) -> None:
    await world.on(0)
    await world.on(1)
    exchanged = await world.answers()
    async with replaced_in_place(world):
        await world.on(0)
        await world.on(1)
        assert await world.answers() == exchanged
        await world.on(0)
    old = await world.answers()
    await world.on(1)
    assert await world.answers() == exchanged != old


def break_staging(worker: Any, after: int) -> None:
    """Runs in the worker: the next weights to be made ready end after so many tensors."""
    from services.staging import Staged

    whole = Staged._weights

    def some(staged: Staged) -> Any:
        Staged._weights = whole  # type: ignore[method-assign]  # as it was
        for number, item in enumerate(staged._weights()):
            if number == after:
                raise OSError("the disk is gone")
            yield item

    Staged._weights = some  # type: ignore[method-assign,assignment]  # for once


@pytest.mark.parametrize("after", [0, 7])
async def test_weights_that_cannot_be_made_ready_leave_serving_alone(world: World, after: int) -> None:
    await world.on(0)
    old = await world.answers()
    await world.engine.llm.collective_rpc(break_staging, args=(after,))
    swap = await world.engine.swap(world.versions[1])
    assert (swap.outcome, swap.pause_seconds) == (REFUSED, 0.0)
    assert "the disk is gone" in swap.error
    assert await world.answers() == old
    await world.on(1)
    assert await world.answers() != old


def break_next_load(worker: Any, after: int) -> None:
    """Runs in the worker: the next load fails once it has read `after` tensors."""
    model = worker.model_runner.get_model()
    load = model.load_weights

    def load_weights(weights: Any) -> Any:
        del model.load_weights

        def some() -> Any:
            for number, item in enumerate(weights):
                if number == after:
                    raise OSError("the disk is gone")
                yield item

        return load(some())

    model.load_weights = load_weights


@pytest.mark.parametrize("after", [0, 1, 4, 7, 15])
async def test_a_load_that_fails_midway_leaves_the_old_weights(world: World, after: int) -> None:
    """Also where a layer had some of its new weights: they must not count when the old ones are loaded."""
    await world.on(0)
    old = await world.answers()
    running = [asyncio.create_task(world.answer([6, n], f"run-{after}-{n}", max_tokens=200)) for n in range(4)]
    async with replaced_in_place(world):
        await world.engine.llm.collective_rpc(break_next_load, args=(after,))
        swap = await world.engine.swap(world.versions[1])
    assert swap.outcome == ROLLED_BACK
    assert "the disk is gone" in swap.error
    assert [len((await task).outputs[0].token_ids) for task in running] == [200] * 4
    assert await world.answers() == old
    await world.on(2)
    after_good = await world.answers()
    await world.on(0)
    await world.on(2)
    assert await world.answers() == after_good


async def test_a_version_that_does_not_reproduce_its_probe_is_undone(world: World) -> None:
    await world.on(0)
    old = await world.answers()
    running = asyncio.create_task(world.answer([3, 3], "run-probe", max_tokens=200))
    swap = await world.engine.swap(with_probe(world.versions[1], world.versions[2].manifest.probes[0]))
    assert swap.outcome == ROLLED_BACK
    assert "does not compute what its manifest says" in swap.error
    spans = (await running).outputs[0].weight_versions
    assert {span.version for span in spans} == {"policy-000000"}
    assert await world.answers() == old


async def test_a_load_that_is_too_slow_is_given_up(world: World) -> None:
    await world.on(0)
    old = await world.answers()
    swapper = world.engine._swapper
    settings = swapper._settings
    swapper._settings = settings.model_copy(update={"swap_load_seconds": 0.001})
    swap = await world.engine.swap(world.versions[1])
    swapper._settings = settings
    assert swap.outcome == REFUSED
    assert "TimeoutError" in swap.error
    assert await world.answers() == old


async def test_what_becomes_of_requests_in_flight_is_as_the_mode_says(world: World) -> None:
    for mode, length, spans in (
        ("wait", 150, {"policy-000000"}),
        ("abort", None, {"policy-000000"}),
        ("keep", 150, {"policy-000000", "policy-000001"}),
    ):
        await world.on(0)
        first = asyncio.Event()

        async def one(name: str = mode, first: asyncio.Event = first) -> Any:
            import vllm

            sampling = vllm.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=150)
            outputs = []
            async for output in world.engine.llm.generate(vllm.TokensPrompt(prompt_token_ids=[4, 2]), sampling, name):
                outputs.append(output.outputs[0])
                first.set()
            return outputs[-1]

        task = asyncio.create_task(one())
        await first.wait()
        assert (await world.engine.swap(world.versions[1], mode=mode)).outcome == LIVE  # type: ignore[arg-type]  # one of the three
        output = await task
        assert {span.version for span in output.weight_versions or ()} <= spans
        if length is None:
            assert output.finish_reason == "abort"
            assert len(output.token_ids) < 150
        else:
            assert output.finish_reason == "length"
            assert len(output.token_ids) == length


def generating_on(world: World) -> Generating:
    """What the policy service runs requests with, on this engine; nothing is recorded."""
    folder = world.versions[0].path
    return Generating(
        engine=world.engine,
        encoder=PromptEncoder(folder),
        recorder=SimpleNamespace(record=lambda event: None),  # type: ignore[arg-type]  # nobody reads it here
        key=ReceiptKey.load(folder.parents[1] / "keys"),
        limits=Limits(2048, 1900),
    )


async def test_deltas_are_put_together_for_as_long_as_is_set(world: World) -> None:
    generating = generating_on(world)
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True, top_logprobs=2)
    asked = generating.check(pb.Prompt(text="Tell me"), sampling, tenant="t", stream=True)
    *each, whole = [piece async for piece in generating.pieces(asked, 0, stream=True)]
    *held, again = [piece async for piece in generating.pieces(asked, 0, stream=True, coalesce=0.1)]
    assert len(each) > 100
    assert 2 <= len(held) < 50
    assert isinstance(whole, pb.Generation)
    assert isinstance(again, pb.Generation)
    assert (again.text, again.token_ids, again.logprobs) == (whole.text, whole.token_ids, whole.logprobs)
    for pieces, finished in ((each, whole), (held, again)):
        assert "".join(piece.text for piece in pieces) == finished.text
        assert [token for piece in pieces for token in piece.token_ids] == list(finished.token_ids)
        assert [one for piece in pieces for one in piece.logprobs] == list(finished.logprobs)
        assert [one for piece in pieces for one in piece.top_logprobs] == list(finished.top_logprobs)


async def test_a_cancelled_call_frees_its_slot_within_one_step(world: World) -> None:
    """All slots are taken, and one more call waits. Of two calls over gRPC, one is cancelled: at the next step that is
    put together, the other has its place. Steps are counted by the tokens of a request that goes on throughout.
    """
    generating = generating_on(world)
    admission = Admission(slots=SLOTS, most=64, max_wait=60.0)
    service = PolicyService(generating, admission, Bulk(generating, slots=2, people=lambda: 0), coalesce=0.0)
    server = grpc.aio.server()
    add_PolicyServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    steps, stepped = 0, asyncio.Event()

    async def companion(number: int) -> None:
        nonlocal steps
        import vllm
        from vllm.sampling_params import RequestOutputKind

        sampling = vllm.SamplingParams(ignore_eos=True, max_tokens=1900, output_kind=RequestOutputKind.DELTA)
        prompt = vllm.TokensPrompt(prompt_token_ids=[5, number])
        async for output in world.engine.llm.generate(prompt, sampling, f"companion-{number}"):
            if number == 0:
                steps += len(output.outputs[0].token_ids)
                stepped.set()

    companions = [asyncio.create_task(companion(number)) for number in range(SLOTS - 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = PolicyServiceStub(channel)
        sampling = pb.SamplingParams(max_tokens=1900, ignore_eos=True)
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text="Go on"), sampling=sampling)
        taken = []
        await stepped.wait()
        for _ in range(4):
            leaving = stub.GenerateStream(request, timeout=60)
            assert (await leaving.read()).delta.token_ids
            waiting = stub.GenerateStream(request, timeout=60)
            first = asyncio.ensure_future(waiting.read())
            seen = steps
            while steps < seen + 10:
                stepped.clear()
                await stepped.wait()
            assert not first.done()  # there is no room
            seen = steps
            leaving.cancel()
            assert (await first).delta.token_ids
            taken.append(steps - seen)
            waiting.cancel()
        print(f"steps from the cancelled call to the first token of the one that waited: {taken}")
        # The step that was under way, the one that vLLM puts together ahead of it, and that of the first token.
        assert sorted(taken)[1] <= 3
    for task in companions:
        task.cancel()
    await asyncio.wait(companions)
    await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A reward model."""
    home = tmp_path_factory.mktemp("home")
    versions = publish(Deployment(home), tmp_path_factory.mktemp("models"), REWARD)
    engine = await Engine.start(versions[0], EngineSettings(home=home), pooling=True)
    yield World(engine, versions)
    await engine.close()


async def _score(engine: Engine, tokens: list[int], name: str) -> float:
    import vllm

    params = vllm.PoolingParams(task="classify", use_activation=False)
    async for output in engine.llm.encode(vllm.TokensPrompt(prompt_token_ids=tokens), params, name):
        return float(output.outputs.data.float().flatten()[0])  # the overall score is the first head's
    raise AssertionError("no score")


async def test_a_score_is_probed_and_a_wrong_one_undone(scorer: World) -> None:
    probe = scorer.versions[0].manifest.probes[0]
    tokens = [*probe.prompt_token_ids, *probe.token_ids]
    await scorer.engine.llm.pause_generation(mode="keep", clear_cache=True)
    (found,) = await scorer.engine.llm.collective_rpc("probe_score", args=(tokens,))
    await scorer.engine.llm.resume_generation()
    assert found == pytest.approx([await _score(scorer.engine, tokens, "told")], abs=1e-6)
    assert found == pytest.approx([probe.score], abs=0.1)  # both compute in bf16
    wrong = Probe(prompt_token_ids=probe.prompt_token_ids, token_ids=probe.token_ids, score=probe.score + 9)
    swap = await scorer.engine.swap(with_probe(scorer.versions[1], wrong))
    assert swap.outcome == ROLLED_BACK
    assert [await _score(scorer.engine, tokens, "after")] == found
    assert (await scorer.engine.swap(scorer.versions[1])).outcome == LIVE
    assert [await _score(scorer.engine, tokens, "other")] != found
