"""Users who vote, retry and change their minds, and who write down what they were told: the journal."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from tests.faults.checker import Acked, AckedRetraction, Asked, AskedToRetract, Entry, Vote
from tests.unit.services.collector import parts
from tests.unit.services.collector.parts import Deployment
from thumbwheel.v1 import preference_pb2_grpc
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.preference_pb2 import Feedback, RetractRequest, SubmitFeedbackRequest

PAIRS_A_PROMPT = 4
_WORDS = "amber birch cedar delta ember fjord grove heron inlet jetty kelp larch moss north otter pine reed".split()  # noqa: SIM905
_CALL_SECONDS = 3.0
_RETRY_SECONDS = 0.05
_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,  # what a connection says that was cut in the middle
}
_FREE_SPACE = "Free space on that disk, then send it again with the same key"
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


@dataclass(frozen=True, slots=True)
class Ballot:
    """A vote, as it is submitted and as it is journalled, with the responses that it is about."""

    feedback: Feedback
    vote: Vote
    generations: Sequence[GenerationEvent]


@dataclass
class Load:
    """Clients of one deployment. `journal` and `generations` grow while they run."""

    deployment: Deployment
    random: random.Random
    journal: list[Entry] = field(default_factory=list)
    generations: list[GenerationEvent] = field(default_factory=list)
    arrived: list[GenerationEvent] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    asked_after: float = 0.0
    acked_at: float = 0.0
    """When the first submission that was asked after `asked_after` was said OK to, both by the monotonic clock."""
    done_again: int = 0
    """Submissions that the collector had done already when it was asked: tries that were in vain."""

    def ballots(self) -> Iterator[Ballot]:
        """Votes for ever: several pairs of candidates a prompt, each judged by one user, and some thumbs."""
        draw, number = self.random, 0
        while True:
            prompt_id = parts.new_id()
            words = " ".join(draw.choices(_WORDS, k=12))
            for _ in range(PAIRS_A_PROMPT):
                number += 1
                a, b = (
                    self.deployment.generation(
                        " ".join(draw.choices(_WORDS, k=8)) + f" {number}{side}", prompt_id, words
                    )
                    for side in "ab"
                )
                key, user = f"vote-{number}", f"user-{draw.randrange(10_000)}"
                if draw.random() < 0.15:
                    yield Ballot(parts.thumb(a, key=key, user=user), Vote(key, prompt_id), [a])
                    continue
                a_won = draw.random() < 0.5
                chosen, rejected = (a, b) if a_won else (b, a)
                vote = Vote(key, prompt_id, chosen.generation.generation_id, rejected.generation.generation_id)
                preference = parts.A if a_won else parts.B
                yield Ballot(parts.comparison(a, b, preference, key=key, user=user), vote, [a, b])

    async def run(self, address: str, *, clients: int, pause: float, stop: asyncio.Event) -> None:
        """Votes until `stop`, each client after pauses of `pause` seconds on average. Returns when all has been said OK
        to: nothing is given up.
        """
        ballots = self.ballots()
        async with grpc.aio.insecure_channel(address, options=_CHANNEL) as channel:
            stub: preference_pb2_grpc.PreferenceServiceAsyncStub = preference_pb2_grpc.PreferenceServiceStub(channel)
            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(self._user(stub, ballots, pause, stop))

    async def _user(
        self,
        stub: preference_pb2_grpc.PreferenceServiceAsyncStub,
        ballots: Iterator[Ballot],
        pause: float,
        stop: asyncio.Event,
    ) -> None:
        draw = self.random
        while not stop.is_set():
            ballot = next(ballots)
            late = draw.random() < 0.2
            if not late:
                self._serve(ballot)
            self.journal.append(Asked(ballot.vote))
            feedback_id = await self._submit(stub, ballot)
            if late:
                self._serve(ballot)
            if draw.random() < 0.1:
                await self._submit(stub, ballot, first=False)
            if draw.random() < 0.15:
                self.journal.append(AskedToRetract(feedback_id))
                await self._retract(stub, feedback_id, ballot.feedback.user_id)
            await asyncio.sleep(draw.expovariate(1 / pause))

    def _serve(self, ballot: Ballot) -> None:
        """The policy has served these responses: they are to go onto the stream."""
        self.generations += ballot.generations
        self.arrived += ballot.generations

    async def _submit(
        self, stub: preference_pb2_grpc.PreferenceServiceAsyncStub, ballot: Ballot, *, first: bool = True
    ) -> str:
        while True:
            asked = time.monotonic()
            try:
                request = SubmitFeedbackRequest(feedback=ballot.feedback)
                answer = await stub.SubmitFeedback(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                await self._refused(error)
            else:
                self.journal.append(Acked(ballot.vote.key, answer.feedback_id))
                if asked >= self.asked_after:
                    self.acked_at = self.acked_at or time.monotonic()
                self.done_again += answer.duplicate and first
                return answer.feedback_id

    async def _retract(self, stub: preference_pb2_grpc.PreferenceServiceAsyncStub, id: str, user: str) -> None:
        while True:
            try:
                await stub.Retract(RetractRequest(feedback_id=id, user_id=user), timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                await self._refused(error)
            else:
                self.journal.append(AckedRetraction(id))
                return

    async def _refused(self, error: grpc.aio.AioRpcError) -> None:
        """Waits, where the same may succeed later; else raises."""
        if error.code() not in _AGAIN and _FREE_SPACE not in (error.details() or ""):
            raise error
        self.refusals.append(f"{error.code().name}: {error.details()}")
        await asyncio.sleep(_RETRY_SECONDS)
