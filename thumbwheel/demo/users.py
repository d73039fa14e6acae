"""Simulated users: they ask, look at two answers, and say which they like better, by a rule that reads the text."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from thumbwheel import errors
from thumbwheel.client import AsyncClient, Message
from thumbwheel.demo.preferences import Preference
from thumbwheel.v1.policy_pb2 import Generation, SamplingParams

_READING_SECONDS = 6.0
"""How long a person looks at an answer before giving it a thumb."""


@dataclass
class Ledger:
    """What the users did, and what they were told: the demo's own books, against which the wheel is checked."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    comparisons: dict[str, float] = field(default_factory=dict)
    """Acknowledged verdicts for one of two answers: feedback id → when, in seconds since the epoch."""
    ties: set[str] = field(default_factory=set)
    """Acknowledged ties."""
    thumbs: set[str] = field(default_factory=set)
    """Acknowledged thumbs."""

    @property
    def acked(self) -> int:
        """All feedback that was acknowledged."""
        return len(self.comparisons) + len(self.ties) + len(self.thumbs)

    def failed(self, error: errors.ThumbwheelError) -> None:
        """A request that did not succeed."""
        self.failures.append(f"{type(error).__name__}: {error}")


class Users:
    """A crowd with one preference in common."""

    def __init__(
        self, client: AsyncClient, preference: Preference, prompts: Sequence[str], sampling: SamplingParams, seed: int
    ) -> None:
        self._client, self._preference, self._sampling = client, preference, sampling
        self._random = random.Random(seed)
        self._prompts = list(prompts)
        self._queue: list[str] = []
        self.ledger = Ledger()

    def _next_prompt(self) -> str:
        """Everybody's next question: all prompts once in random order, then again."""
        if not self._queue:
            self._queue = self._random.sample(self._prompts, len(self._prompts))
        return self._queue.pop()

    async def compare(self, count: int, concurrency: int, told: asyncio.Queue[str]) -> None:
        """Gives exactly `count` verdicts for one of two answers; ties do not count. `told` gets an id for each."""
        wanted = count

        async def user(name: str) -> None:
            nonlocal wanted
            while wanted > 0:
                wanted -= 1
                try:
                    decided = await self._compare_once(name)
                except errors.ThumbwheelError as error:
                    self.ledger.failed(error)
                    decided = None
                if decided is None:
                    wanted += 1
                    if len(self.ledger.failures) > count:
                        return  # something is badly wrong; the demo's verdict will say what
                else:
                    told.put_nowait(decided)

        async with asyncio.TaskGroup() as group:
            for index in range(min(concurrency, count)):
                group.create_task(user(f"user-{index:02d}"))

    async def _compare_once(self, name: str) -> str | None:
        """Asks one question and compares the answers. Returns the feedback's id, or None for a tie."""
        prompt = self._next_prompt()
        self.ledger.requests += 1
        shown = await self._client.candidates(prompt, n=2, sampling=self._sampling, user_id=name)
        a, b = shown.candidates
        choice = self._preference.prefer(prompt, a.text, b.text)
        self.ledger.requests += 1
        answer = await self._client.compare(a, b, choice, user_id=name)
        if choice == "tie":
            self.ledger.ties.add(answer.feedback_id)
            return None
        self.ledger.comparisons[answer.feedback_id] = time.time()
        return answer.feedback_id

    async def chat(self) -> None:
        """One user who never leaves: streams an answer, reads it, gives it a thumb; also while weights are swapped.

        Each question follows on the last answer, so no two thumbs are for one prompt and none make up a comparison.
        """
        said: list[Message] = []
        while True:
            prompt = self._next_prompt()
            try:
                self.ledger.requests += 1
                answer: Generation | None = None
                asked = [*said, ("user", prompt)]
                async for piece in self._client.stream(asked, sampling=self._sampling, user_id="chatter"):
                    answer = piece if isinstance(piece, Generation) else None
                if answer is None:
                    raise errors.Internal("A stream ended without its closing message.")
                await asyncio.sleep(_READING_SECONDS)
                self.ledger.requests += 1
                up = self._preference.shows(prompt, answer.text)
                acked = await self._client.thumb(answer, up=up, user_id="chatter")
                self.ledger.thumbs.add(acked.feedback_id)
                said = [("user", prompt), ("assistant", answer.text or " ")]
            except errors.ThumbwheelError as error:
                self.ledger.failed(error)
                await asyncio.sleep(1.0)
