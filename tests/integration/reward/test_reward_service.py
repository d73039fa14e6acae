"""The reward service as applications meet it: the real process, real vLLM, a real broker, a tiny model."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.prompts import PromptEncoder
from tests.support import Deployment, Process, announce, free_port, until
from thumbwheel import errors
from thumbwheel.client import AsyncClient, to_prompt
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.stream.log import Log
from thumbwheel.v1 import policy_pb2, reward_pb2
from thumbwheel.v1.rollout_pb2 import ModelRole

pytestmark = pytest.mark.timeout(420)
REWARD = ModelRole.MODEL_ROLE_REWARD
ITEMS = [(f"Question {i}", f"Answer number {i}, " + "and so on " * i) for i in range(8)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """With reward-000000 in its store."""
    deployment = Deployment(tmp_path_factory.mktemp("home"))
    deployment.publish(REWARD, 0, seed=0)
    return deployment


@pytest.fixture(scope="module")
def log(deployment: Deployment) -> Iterator[Log]:
    """A real broker."""
    with EmbeddedBroker(port=free_port(), log=deployment.home / "broker.log") as broker:
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        (deployment.home / "bootstrap").write_text(broker.bootstrap_servers)
        yield log
        log.close()


def _process(deployment: Deployment, processes: list[Process], name: str) -> Process:
    servers = (deployment.home / "bootstrap").read_text()
    arguments = ["--home", str(deployment.home), "--bootstrap-servers", servers, "--max-model-len", "512"]
    process = Process("services.reward", arguments, deployment.home / f"{name}.log")
    processes.append(process)
    return process.start().wait_serving()


@pytest.fixture(scope="module")
def process(deployment: Deployment, log: Log, processes: list[Process]) -> Process:
    """The service."""
    return _process(deployment, processes, "reward")


@pytest.fixture
async def client(process: Process) -> AsyncIterator[AsyncClient]:
    """Talks to the service."""
    async with AsyncClient(reward=process.address, timeout=60.0) as client:
        yield client


async def _scores(client: AsyncClient) -> list[float]:
    """One at a time, so that batching cannot differ."""
    return [(await client.score(prompt, answer)).scores[0].score for prompt, answer in ITEMS]


def _with_transformers(folder: Path) -> list[list[float]]:
    """The score at the closing token, computed without vLLM."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    encoder, scores = PromptEncoder(folder), []
    for prompt, answer in ITEMS:
        ids = encoder.encode_scored(to_prompt(prompt), answer, limit=512, field="", response_field="")
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(model.score(hidden).tolist())
    return scores


async def test_scores_are_those_of_transformers(deployment: Deployment, client: AsyncClient) -> None:
    answer = await client.score_items(
        [reward_pb2.ScoreItem(prompt=to_prompt(prompt), response=response) for prompt, response in ITEMS]
    )
    expected = _with_transformers(deployment.home / "store/reward-000000")
    assert answer.version == "reward-000000"
    # The engine computes in bf16.
    assert [score.score for score in answer.scores] == pytest.approx([row[0] for row in expected], abs=0.1)
    assert [score.aspects["helpfulness"] for score in answer.scores] == pytest.approx(
        [row[1] for row in expected], abs=0.1
    )
    assert [score.uncertainty for score in answer.scores] == pytest.approx(
        [statistics.stdev(row[2:]) for row in expected], abs=0.1
    )
    assert max(row[0] for row in expected) - min(row[0] for row in expected) > 0.2
    assert not answer.scores[0].HasField("score_over_reference")
    assert answer.scores[1].tokens > answer.scores[0].tokens


async def test_compare_is_bradley_terry(client: AsyncClient) -> None:
    answer = await client.judge("Which?", "this one", "that other one, which is longer")
    odds = answer.score_a.score - answer.score_b.score
    assert answer.probability_a == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)
    mirrored = await client.judge("Which?", "that other one, which is longer", "this one")
    assert mirrored.probability_a == pytest.approx(1 - answer.probability_a, abs=0.02)


async def test_compare_says_how_sure_it_is(client: AsyncClient) -> None:
    answer = await client.judge("Which?", "this one", "that other one, which is longer")
    assert 0 < answer.uncertainty < 1
    odds = answer.score_a.aspects["helpfulness"] - answer.score_b.aspects["helpfulness"]
    assert answer.aspects["helpfulness"] == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)
    about = await client.reward()
    assert (about.temperature, list(about.aspects)) == (1.0, ["helpfulness"])


async def test_a_score_over_the_reference_is_less_its_score(client: AsyncClient) -> None:
    prompt = to_prompt("How?")
    items = [
        reward_pb2.ScoreItem(prompt=prompt, response=text, reference_response="Like this.") for text in ("So.", "Thus.")
    ]
    answer = await client.score_items(items)
    (reference,) = (await client.score("How?", "Like this.")).scores
    for score in answer.scores:
        assert score.score_over_reference == pytest.approx(score.score - reference.score, abs=0.02)


async def test_a_dialogue_that_is_too_long_loses_its_beginning(client: AsyncClient) -> None:
    tail = [("user", "And then?"), ("assistant", "b" * 300), ("user", "Why?")]
    scores = []
    for first in ("x" * 400, "y" * 700):
        turns = [policy_pb2.ChatMessage(role=policy_pb2.ROLE_USER, content=first)]
        turns += [
            policy_pb2.ChatMessage(role=getattr(policy_pb2, f"ROLE_{role.upper()}"), content=content)
            for role, content in tail
        ]
        prompt = policy_pb2.Prompt(chat=policy_pb2.Chat(messages=turns))
        (score,) = (await client.score_items([reward_pb2.ScoreItem(prompt=prompt, response="c" * 200)])).scores
        assert score.tokens == 512
        scores.append(score.score)
    assert scores[0] == pytest.approx(scores[1], abs=0.02)  # what differed was cut


async def test_a_stream_keeps_its_order(client: AsyncClient) -> None:
    items = [reward_pb2.ScoreItem(prompt=to_prompt(prompt), response=answer) for prompt, answer in ITEMS * 10]
    streamed = [answer async for answer in client.score_stream(items)]
    alone = await _scores(client)
    assert [answer.score.score for answer in streamed] == pytest.approx(alone * 10, abs=0.1)
    broken = [*items[:3], reward_pb2.ScoreItem(prompt=to_prompt("x"))]
    with pytest.raises(errors.InvalidArgument) as caught:
        _ = [answer async for answer in client.score_stream(broken)]
    assert caught.value.field == "item.response"


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (reward_pb2.ScoreItem(response="x"), "items[0].prompt"),
        (reward_pb2.ScoreItem(prompt=to_prompt("x")), "items[0].response"),
        (reward_pb2.ScoreItem(prompt=to_prompt("x"), response="long " * 500), "items[0].response"),
        (reward_pb2.ScoreItem(prompt=to_prompt(""), response="x"), "items[0].prompt.chat.messages[0].content"),
        (reward_pb2.ScoreItem(prompt=policy_pb2.Prompt(text=" "), response="x"), "items[0].prompt.text"),
    ],
)
async def test_bad_input_names_the_field(client: AsyncClient, item: reward_pb2.ScoreItem, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.score_items([item])
    assert caught.value.field == field
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.score_items([])
    assert caught.value.field == "items"


async def test_a_swap_is_true(deployment: Deployment, log: Log, client: AsyncClient, processes: list[Process]) -> None:
    """After it, scores are those of a cold start; a call that it meets is scored by one version from end to end."""
    before = await _scores(client)
    new = deployment.publish(REWARD, 1, seed=1)
    digest = deployment.store.load(new.version).manifest_sha256
    items = [reward_pb2.ScoreItem(prompt=to_prompt(prompt), response=answer) for prompt, answer in ITEMS]
    answers: list[reward_pb2.ScoreResponse] = []
    stop = asyncio.Event()

    async def user() -> None:
        while not stop.is_set():
            answers.append(await client.score_items(items))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(user())

        async def busy() -> bool:
            return len(answers) >= 4

        await until(busy)
        producer = await asyncio.to_thread(log.producer)
        await asyncio.to_thread(announce, producer, new, digest)

        async def live() -> bool:
            return (await client.reward()).version == new.version

        await until(live)
        await client.score_items(items)
        stop.set()
    producer.close(5)
    after = await _scores(client)
    assert max(abs(b - a) for b, a in zip(before, after, strict=True)) > 0.2
    for answer in answers:
        expected = before if answer.version == "reward-000000" else after
        assert [score.score for score in answer.scores] == pytest.approx(expected, abs=0.1)
    assert {answer.version for answer in answers} == {"reward-000000", "reward-000001"}

    cold = _process(deployment, processes, "cold")
    async with AsyncClient(reward=cold.address) as cold_client:
        assert (await cold_client.reward()).version == new.version
        # What is read from the cache, as some of it was before, rounds otherwise than what is computed.
        assert await _scores(cold_client) == pytest.approx(after, abs=0.02)
    assert cold.stop() == 0
