"""`make bench-reward-serving`: the reward service beside Transformers and vLLM's own server, on the default model.

    score_vs_transformers   sequences a second of `Score` ÷ those of Transformers on all cores, sequences of like length
                            in a batch, in the precision and the batch size that are fastest here
    score_vs_vllm_http      ÷ those of the classify endpoint of vLLM's OpenAI server, asked as many at once
    four_vs_one             time of a call with four candidates ÷ that of a call with one: prompts of 300 tokens,
                            replies of 60, no two prompts alike

The service runs as `thumbwheel up` starts it, and vLLM's server with the same engine arguments. In each round all three
score the same dialogues, which none has seen before, one after the other; that they give the same scores is checked
before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import harness
from bench.harness import Ratio, Target
from bench.serving_processes import Server, http_server
from services.prompts import PromptEncoder
from tests.support import Deployment, Process, free_port
from thumbwheel.client import AsyncClient, to_prompt
from thumbwheel.heads import Heads
from thumbwheel.stream import open_log, topics
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.v1.reward_pb2 import ScoreItem
from thumbwheel.v1.rollout_pb2 import ModelRole

if TYPE_CHECKING:
    import torch

HEADS = Heads(("helpfulness", "harmlessness", "fluency"), 4)
"""As the trainer's settings have them by default."""
CALLS, ITEMS = 4, 12
"""Calls at once, and the items of each."""
PROMPT_WORDS, REPLY_WORDS = (20, 200), (10, 110)
"""Lengths of the dialogues of a round, each as likely as the others."""
PROMPT_TOKENS, REPLY_TOKENS, CANDIDATES, PROMPTS = 300, 60, 4, 8
"""Of `four_vs_one`; prompts a round, of either kind."""
BATCH_SIZES = (4, 8, 16)
HOPELESS = 2.0
"""A precision that takes so many times as long for one sequence is not tried further."""
SECONDS = 120.0
LIMIT = 2048
TOLERANCE = 0.15
"""By how much scores may differ: they are computed in bf16."""
_FIRST = "The"
_WORDS = ("river", "stone", "market", "winter", "engine", "garden", "letter", "music", "paper", "window", "table")


@dataclass(frozen=True)
class Dialogue:
    """A question and a reply to it."""

    question: str
    reply: str

    @property
    def item(self) -> ScoreItem:
        """As our service takes it."""
        return ScoreItem(prompt=to_prompt(self.question), response=self.reply)


class Dialogues:
    """No two alike, so that none is in a cache already."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._random, self._encoder = random.Random(0), encoder
        self._frame = len(encoder.encode(to_prompt(_FIRST))) - 1

    def take(self, count: int) -> list[Dialogue]:
        """The next ones, of lengths that differ."""
        sizes = [(self._random.randint(*PROMPT_WORDS), self._random.randint(*REPLY_WORDS)) for _ in range(count)]
        return [Dialogue(self._words(prompt), self._words(reply)) for prompt, reply in sizes]

    def candidates(self, count: int) -> list[ScoreItem]:
        """Replies to one new prompt, of the lengths that `four_vs_one` is about."""
        question = self._words(PROMPT_TOKENS - self._frame)
        return [Dialogue(question, self._words(REPLY_TOKENS)).item for _ in range(count)]

    def tokens(self, dialogue: Dialogue) -> list[int]:
        """What every side is to read."""
        return self._encoder.encode_scored(
            to_prompt(dialogue.question), dialogue.reply, limit=LIMIT, field="", response_field=""
        )

    def text(self, dialogue: Dialogue) -> str:
        """The same as one text."""
        tokenizer = self._encoder.tokenizer
        asked = [{"role": "user", "content": dialogue.question}]
        frame: str = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        return frame + dialogue.reply + str(tokenizer.eos_token)

    def _words(self, count: int) -> str:
        """So many words, each of which is a token."""
        return " ".join([_FIRST, *self._random.choices(_WORDS, k=count - 1)])


@dataclass
class Ours:
    """The reward service."""

    client: AsyncClient

    async def scores(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """[N] scores, by `CALLS` calls at once."""
        calls = [self.client.score_items([one.item for one in part]) for part in _parts(dialogues)]
        answers = await asyncio.gather(*calls)
        return [score.score for answer in answers for score in answer.scores]

    async def seconds(self, items: Sequence[ScoreItem]) -> float:
        """How long a call takes."""
        start = time.perf_counter()
        answer = await self.client.score_items(items)
        taken = time.perf_counter() - start
        sizes = {score.tokens for score in answer.scores}
        if sizes != {PROMPT_TOKENS + REPLY_TOKENS + 1}:
            raise RuntimeError(f"the candidates have {sizes} tokens")
        return taken


@dataclass
class Http:
    """The classify endpoint of vLLM's OpenAI server."""

    port: int
    dialogues: Dialogues

    async def scores(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """[N] scores, by `CALLS` calls at once."""
        answers = await asyncio.gather(*(self._call(part) for part in _parts(dialogues)))
        return [score for answer in answers for score in answer]

    async def _call(self, dialogues: Sequence[Dialogue]) -> list[float]:
        asked = {
            "model": "default",
            "input": [self.dialogues.text(one) for one in dialogues],
            "add_special_tokens": False,
            "use_activation": False,
        }
        body = json.dumps(asked).encode()
        head = f"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(head.encode() + body)
            answer, _, content = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        if b" 200 " not in answer.partition(b"\r\n")[0]:
            raise RuntimeError(f"the HTTP server answers {answer!r} {content!r}")
        found = json.loads(content)
        if found["usage"]["prompt_tokens"] != sum(len(self.dialogues.tokens(one)) for one in dialogues):
            raise RuntimeError("the HTTP server reads other tokens than we do")
        return [one["probs"][0] for one in found["data"]]


class Transformers:
    """Transformers in this process, on all cores."""

    def __init__(self, model: Path, dialogues: Dialogues) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        self._dialogues = dialogues
        dtypes = (torch.bfloat16, torch.float32)
        self._models = {
            dtype: AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval() for dtype in dtypes
        }
        self._fastest: tuple[torch.dtype, int] = (torch.bfloat16, BATCH_SIZES[0])

    def choose(self, dialogues: Sequence[Dialogue]) -> str:
        """Takes the precision and the batch size that are fastest, and says which; the others are let go."""
        shortest = min(dialogues, key=lambda one: len(self._dialogues.tokens(one)))
        for dtype in self._models:
            self._run(dtype, 1, [shortest])
        alone = {dtype: self._seconds(dtype, 1, [shortest]) for dtype in self._models}
        # A processor without instructions for bf16 would take an hour to come last.
        hopeful = [dtype for dtype, seconds in alone.items() if seconds < HOPELESS * min(alone.values())]
        took: dict[tuple[torch.dtype, int], float] = {}
        for dtype in hopeful:
            self._run(dtype, BATCH_SIZES[-1], dialogues)
            for size in BATCH_SIZES:
                took[dtype, size] = self._seconds(dtype, size, dialogues)
        self._fastest = min(took, key=lambda one: took[one])
        self._models = {self._fastest[0]: self._models[self._fastest[0]]}
        shown = (f"{len(dialogues) / took[one]:.1f} ({one[0]}, {one[1]} a batch)" for one in took)
        return f"Transformers, sequences/s: {', '.join(shown)}"

    def _seconds(self, dtype: torch.dtype, size: int, dialogues: Sequence[Dialogue]) -> float:
        start = time.perf_counter()
        self._run(dtype, size, dialogues)
        return time.perf_counter() - start

    async def scores(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """[N] scores. Nothing else is done meanwhile."""
        return self._run(*self._fastest, dialogues)

    def _run(self, dtype: torch.dtype, size: int, dialogues: Sequence[Dialogue]) -> list[float]:
        import torch

        model, scores = self._models[dtype], [0.0] * len(dialogues)
        read = [torch.tensor(self._dialogues.tokens(one)) for one in dialogues]
        by_length = sorted(range(len(read)), key=lambda index: len(read[index]))
        for at in range(0, len(by_length), size):
            batch = by_length[at : at + size]
            lengths = torch.tensor([len(read[index]) for index in batch])
            ids = torch.nn.utils.rnn.pad_sequence([read[index] for index in batch], batch_first=True)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            with torch.inference_mode():
                hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                # Its own way to the last token looks for padding, which is what our sequences end with.
                found = model.score(hidden[torch.arange(len(batch)), lengths - 1])[:, 0].tolist()
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
        return scores


def _parts(dialogues: Sequence[Dialogue]) -> Iterator[Sequence[Dialogue]]:
    size = -(-len(dialogues) // CALLS)
    return (dialogues[at : at + size] for at in range(0, len(dialogues), size))


def write_model(base: Path, folder: Path) -> Path:
    """The default model's body under heads that say something."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from trainer import publish

    publish.write_scorer(base, folder, HEADS)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    torch.nn.init.normal_(model.score.weight.data, std=publish.HEAD_STD, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def reward_server(home: Path, bootstrap_servers: str, threads_bind: str) -> Iterator[Process]:
    """Ours, with an engine of its own."""
    arguments = ["--home", str(home), "--bootstrap-servers", bootstrap_servers, "--cpu-threads-bind", threads_bind]
    process = Process("services.reward", [*arguments, "--log-level", "warning"], home / "reward.log").start()
    try:
        yield process.wait_serving()
    finally:
        process.kill()


Score = Callable[[Sequence[Dialogue]], Awaitable[list[float]]]


@dataclass
class Bench:
    """Everything that is measured."""

    dialogues: Dialogues
    ours: Ours
    sides: dict[str, Score]
    servers: dict[str, Server]
    rates: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    candidates: dict[int, list[float]] = field(default_factory=lambda: {1: [], CANDIDATES: []})

    async def check(self) -> None:
        """All sides give the same scores. Raises `RuntimeError`."""
        asked = self.dialogues.take(CALLS * ITEMS)
        found = {name: await score(asked) for name, score in self.sides.items()}
        for name, scores in found.items():
            apart = max(abs(a - b) for a, b in zip(scores, found["ours"], strict=True))
            if apart > TOLERANCE:
                raise RuntimeError(f"scores of {name} are up to {apart:.3f} away from ours")
        if max(found["ours"]) - min(found["ours"]) < 2 * TOLERANCE:
            raise RuntimeError("all scores are alike: that they agree says nothing")

    async def round(self, number: int) -> None:
        """One round; every second one the other way about."""
        asked = self.dialogues.take(CALLS * ITEMS)
        steps = [self._timed(name, asked) for name in self.sides] + [self._candidates()]
        for step in steps[:: -1 if number % 2 else 1]:
            await step

    async def _timed(self, name: str, asked: Sequence[Dialogue]) -> None:
        server = self.servers.get(name)
        before = server.front_end_seconds if server else 0.0
        start = time.perf_counter()
        await self.sides[name](asked)
        self.rates.setdefault(name, []).append(len(asked) / (time.perf_counter() - start))
        if server:
            taken = 1000 * (server.front_end_seconds - before) / len(asked)
            self.processor.setdefault(name, []).append(taken)

    async def _candidates(self) -> None:
        taken = dict.fromkeys(self.candidates, 0.0)
        for turn in range(PROMPTS):
            for count in list(taken)[:: -1 if turn % 2 else 1]:
                taken[count] += await self.ours.seconds(self.dialogues.candidates(count))
        for count, seconds in taken.items():
            self.candidates[count].append(1000 * seconds / PROMPTS)

    def ratios(self) -> list[Ratio]:
        """The figures."""
        ours, http = self.rates["ours"], self.rates["http"]
        return [
            Ratio(
                "score_vs_transformers", "sequences/s", Target(least=1.0), ours=ours, peer=self.rates["transformers"]
            ),
            Ratio("score_vs_vllm_http", "sequences/s", Target(least=1.05), ours=ours, peer=http),
            Ratio(
                "four_vs_one",
                "ms/call",
                Target(most=2.0),
                ours=self.candidates[CANDIDATES],
                peer=self.candidates[1],
            ),
            Ratio("cpu_vs_vllm_http", "ms/sequence", ours=self.processor["ours"], peer=self.processor["http"]),
        ]


async def run(base: Path, rounds: int, threads_bind: str) -> None:
    """All of it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "home").mkdir()
        model, deployment = write_model(base, folder / "model"), Deployment(folder / "home")
        deployment.publish_copy(ModelRole.MODEL_ROLE_REWARD, 0, model)
        broker = stack.enter_context(EmbeddedBroker(port=free_port(), log=folder / "broker.log"))
        log = open_log(broker.bootstrap_servers)
        log.ensure_topics(topics.topics(partitions=1, replication=1), 30.0)
        log.close()
        process = stack.enter_context(reward_server(deployment.home, broker.bootstrap_servers, threads_bind))
        pooling = ("--runner", "pooling", "--convert", "classify", "--enable-prefix-caching")
        server, port = stack.enter_context(http_server(model, folder / "http.log", *pooling, threads_bind=threads_bind))
        dialogues = Dialogues(PromptEncoder(model))
        transformers = Transformers(model, dialogues)
        print(transformers.choose(dialogues.take(CALLS * ITEMS)), flush=True)
        async with AsyncClient(reward=process.address, timeout=SECONDS) as client:
            ours = Ours(client)
            sides: dict[str, Any] = {"ours": ours, "transformers": transformers, "http": Http(port, dialogues)}
            bench = Bench(
                dialogues,
                ours,
                {name: side.scores for name, side in sides.items()},
                {"ours": Server(process.popen), "http": server},
            )
            await bench.check()
            for number in range(rounds):
                harness.progress(f"round {number + 1} of {rounds}", number / rounds)
                await bench.round(number)
                shown = ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in bench.rates.items())
                calls = ", ".join(f"{count}: {taken[-1]:.0f} ms" for count, taken in bench.candidates.items())
                print(f"round {number + 1}: sequences/s {shown}; candidates {calls}", flush=True)
            harness.progress("", 1.0)
    harness.report("reward-serving", bench.ratios(), rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.reward_serving", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default=None, help="a folder or a Hugging Face id; the default model where left out")
    parser.add_argument("--cpu-threads-bind", default="auto", help="cores of both engines, such as 0-1")
    given = parser.parse_args()
    from trainer import base, runtime

    runtime.before_imports()
    runtime.quiet_transformers()
    asyncio.run(run(base.fetch(given.model), given.rounds, given.cpu_threads_bind))


if __name__ == "__main__":
    main()
