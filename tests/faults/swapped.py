"""What `tests.faults.swaps` runs on: a policy under load, weights that versions are made of, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import Deployment, Process, announce, until
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.status import scrape
from thumbwheel.stream.log import Producer
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole, Probe

POLICY = ModelRole.MODEL_ROLE_POLICY
CHECK = pb.SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)

Answers = list[tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Weights:
    """Weights that versions are made of, over and over, and what they answer."""

    folder: Path
    probe: Probe
    answers: Answers


@dataclass
class Report:
    """What came of it."""

    swaps: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    pauses: list[float] = field(default_factory=list)

    @property
    def sabotaged(self) -> int:
        """Versions that were not as they should have been."""
        return sum(self.outcomes.values()) - self.outcomes["sound"] - self.outcomes["by delta"]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {
                "faults": "swap",
                "swaps": self.swaps,
                "sabotaged": self.sabotaged,
                "outcomes": dict(self.outcomes),
                "calls": self.calls,
                "failed_calls": len(self.failed),
                "wrong_answers": len(self.wrong),
                "kills": self.kills,
                "median_pause_seconds": round(sorted(self.pauses)[len(self.pauses) // 2], 3) if self.pauses else None,
            }
        )


@dataclass
class World:
    """Everything that runs."""

    deployment: Deployment
    producer: Producer
    processes: list[Process]
    """All that were ever started; the first is the one that is swapped."""
    client: AsyncClient
    weights: list[Weights]
    report: Report
    sequence: int = 0
    live: int = 0
    """Which weights are to be live, by index."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0

    @property
    def process(self) -> Process:
        """The one that is swapped."""
        return self.processes[0]

    async def user(self, number: int) -> None:
        """Asks for ever, one question after the other; rests between two where the others do."""
        turn = 0
        while True:
            while not self.open.is_set():  # it may be closed again before this task has its turn
                await self.open.wait()
            turn += 1
            sampling = pb.SamplingParams(max_tokens=48, ignore_eos=True, seed=1000 * number + turn)
            self.busy += 1
            try:
                pieces = [piece async for piece in self.client.stream(f"I am user {number}", sampling=sampling)]
                if len(pieces[-1].token_ids) != 48:
                    self.report.failed.append(f"user {number} got {len(pieces[-1].token_ids)} tokens of 48")
            except errors.ThumbwheelError as error:
                self.report.failed.append(f"user {number}: {error}")
            finally:
                self.busy -= 1
                self.report.calls += 1

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Users have finished what they were at, and ask nothing inside."""
        self.open.clear()

        async def idle() -> bool:
            return self.busy == 0

        await until(idle, every=0.01)
        yield
        self.open.set()

    async def check(self, what: str) -> None:
        """The answers must be, bit for bit, those of a cold start on the weights that are to be live."""
        async with self.quiet():
            found = await answers(self.client)
        if found != self.weights[self.live].answers:
            self.report.wrong.append(f"{self.version()}: {what}")

    def version(self) -> str:
        """The version last published."""
        return f"policy-{self.sequence:06d}"

    def publish(self, model: Path, probe: Probe, *, parent: str = "") -> CheckpointManifest:
        """The next version."""
        self.sequence += 1
        return self.deployment.publish_copy(POLICY, self.sequence, model, probes=[probe], parent=parent)

    def announce(self, manifest: CheckpointManifest, digest: str = "") -> None:
        """Says that a version is to be served."""
        announce(self.producer, manifest, digest or self.deployment.store.load(manifest.version).manifest_sha256)

    async def count(self, metric: str) -> float:
        """A counter of the server."""
        return (await asyncio.to_thread(scrape, f"127.0.0.1:{self.process.metrics_port}")).total(metric)

    async def is_live(self, version: str) -> None:
        """Waits until a version is live, and notes how long it paused the others."""

        async def live() -> bool:
            return (await self.client.policy()).version == version

        await until(live, every=0.02)
        swap = (await self.client.policy()).swaps[-1]
        if swap.pause_seconds:  # else it is what the server was started on
            self.report.pauses.append(swap.pause_seconds)


async def answers(client: AsyncClient) -> Answers:
    """Tokens and log-probabilities, one prompt at a time, so that batching cannot differ."""
    found = []
    for number in range(2):
        prompt = pb.Prompt(tokens=pb.TokenIds(ids=[7 + number, *range(20, 32)]))
        answer = await client.generate(prompt, sampling=CHECK)
        found.append((list(answer.token_ids), list(answer.logprobs)))
    return found
