"""Rollouts: responses of the live policy with their rewards, made by the serving fleet while the learner learns.

    prompts ─▶ GenerateBulk ─▶ responses ─▶ Score ─▶ groups
       ▲      policy, behind people's        reward, a call a group
       │      requests                         │
       └───────────────────────────────────────┘ whichever is away is asked again, until it answers

It runs in a thread of its own. A prompt that was asked comes back exactly once: as a group, or as refused. Services
that are away for minutes only make it come later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.reward_pb2 import RewardScore, ScoreItem
from trainer import metrics
from trainer.prompts import Prompt
from trainer.samples import Group, Rollout

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENT_SECONDS = 300.0
"""A service that answers nothing for so long is asked anew."""
FIRST_PAUSE, LAST_PAUSE = 0.5, 3.0
"""Seconds between attempts."""
_BULK_SECONDS = 86_400.0
_SCORED_AT_ONCE = 8
"""Groups that are scored at the same time."""
_CLOSE_SECONDS = 10.0
_PASSES = (errors.Unavailable, errors.ResourceExhausted, errors.DeadlineExceeded, errors.Internal)
_PASSING_CODES = {error.code.name for error in _PASSES}

Answer = tuple[Prompt, Group | None]
"""What came of a prompt; no group where it was refused."""


class Rollouts:
    """Asks for rollouts in the background. `connect` makes the client, in the thread's event loop."""

    def __init__(
        self,
        connect: Callable[[], AsyncClient],
        *,
        task: str,
        responses: int,
        max_tokens: int,
        pessimism: float = 0.0,
    ) -> None:
        """`responses` to a prompt, of at most `max_tokens`; `pessimism` times its uncertainty is taken off a score."""
        self._connect, self._task, self._pessimism = connect, task, pessimism
        self._count, self._sampling = responses, pb.SamplingParams(temperature=1.0, max_tokens=max_tokens)
        self._asked: asyncio.Queue[Prompt] = asyncio.Queue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._fault: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self.outstanding = 0
        """Prompts that were asked and are not back."""
        self._thread = threading.Thread(target=self._run, name=f"rollouts-{task}", daemon=True)
        self._thread.start()

    def ask(self, prompts: Iterable[Prompt]) -> None:
        """Takes prompts; returns at once."""
        for prompt in prompts:
            self.outstanding += 1
            self._loop.call_soon_threadsafe(self._asked.put_nowait, prompt)

    def answers(self, timeout: float = 0.0) -> list[Answer]:
        """What came back since the last call, waiting up to `timeout` seconds for something. Raises what ended the
        background work, where something did.
        """
        found: list[Answer] = []
        with contextlib.suppress(queue.Empty):
            if timeout and self.outstanding:
                found.append(self._answers.get(timeout=timeout))
            while True:
                found.append(self._answers.get_nowait())
        self.outstanding -= len(found)
        if self._fault is not None:
            raise self._fault
        return found

    def close(self) -> None:
        """Ends the background work. What is not back is given up."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:  # noqa: BLE001 - handed on: `answers` raises it in the trainer's own thread
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            logger.error("rollouts ended: %s", error, extra={"task": self._task})
            self._fault = error
        finally:
            self._loop.close()

    async def _main(self) -> None:
        generated: asyncio.Queue[tuple[Prompt, Sequence[pb.Generation]]] = asyncio.Queue()
        async with self._connect() as client:
            working = [
                asyncio.create_task(self._generate(client, generated.put_nowait), name="generate"),
                asyncio.create_task(self._score(client, generated), name="score"),
            ]
            ended = asyncio.create_task(self._ended.wait(), name="ended")
            done, left = await asyncio.wait({*working, ended}, return_when=asyncio.FIRST_COMPLETED)
            for task in left:
                task.cancel()
            await asyncio.wait(left)
            for task in done - {ended}:
                if not task.cancelled() and (fault := task.exception()) is not None:
                    raise fault
                raise errors.Internal(f"{task.get_name()} ended, which it never should.")

    async def _generate(
        self, client: AsyncClient, hand_on: Callable[[tuple[Prompt, Sequence[pb.Generation]]], None]
    ) -> None:
        pending: dict[str, Prompt] = {}
        pauses = _Pauses("policy", self._task)
        while True:
            if not pending:
                prompt = await self._asked.get()
                pending[prompt.id] = prompt
            while not self._asked.empty():
                prompt = self._asked.get_nowait()
                pending[prompt.id] = prompt
            try:
                async for response in _spoken(
                    client.bulk(self._requests(list(pending.values())), timeout=_BULK_SECONDS)
                ):
                    if response.error.code in _PASSING_CODES:
                        continue  # asked again, with what else is left
                    pauses.over()
                    prompt = pending.pop(response.request_id)
                    if response.error.code:
                        self._refuse(prompt, response.error.message)
                    else:
                        hand_on((prompt, response.generations))
                if pending:
                    await pauses.wait(errors.Unavailable(f"{len(pending)} prompts are not answered."))
            except _PASSES as error:
                await pauses.wait(error)

    async def _requests(self, prompts: Sequence[Prompt]) -> AsyncIterator[pb.GenerateBulkRequest]:
        for prompt in prompts:
            asked = pb.Prompt(tokens=pb.TokenIds(ids=prompt.tokens))
            yield pb.GenerateBulkRequest(request_id=prompt.id, prompt=asked, sampling=self._sampling, n=self._count)

    async def _score(
        self, client: AsyncClient, generated: asyncio.Queue[tuple[Prompt, Sequence[pb.Generation]]]
    ) -> None:
        room = asyncio.Semaphore(_SCORED_AT_ONCE)
        pauses = _Pauses("reward", self._task)

        async def one(prompt: Prompt, generations: Sequence[pb.Generation]) -> None:
            try:
                while True:
                    try:
                        answer = await self._group(client, prompt, generations)
                    except _PASSES as error:
                        await pauses.wait(error)
                    else:
                        pauses.over()
                        break
            except errors.InvalidArgument as error:
                self._refuse(prompt, str(error))
            else:
                self._answers.put((prompt, answer))
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            while True:
                prompt, generations = await generated.get()
                # What can neither be scored nor learnt from is left out: nothing was said, or it was broken off.
                usable = [
                    one
                    for one in generations
                    if one.text and one.token_ids and one.finish_reason != pb.FINISH_REASON_ABORT
                ]
                if not usable:
                    self._refuse(prompt, "none of its responses has any text")
                    continue
                await room.acquire()
                group.create_task(one(prompt, usable))

    async def _group(self, client: AsyncClient, prompt: Prompt, generations: Sequence[pb.Generation]) -> Group:
        """The group of a prompt's responses, all scored by one version."""
        asked = pb.Prompt(tokens=pb.TokenIds(ids=prompt.tokens))
        answer = await client.score_items(
            [ScoreItem(prompt=asked, response=one.text, reference_response=prompt.reference) for one in generations]
        )
        first = answer.scores[0]
        return Group(
            id=prompt.id,
            prompt=prompt.tokens,
            rollouts=tuple(
                Rollout(
                    tokens=tuple(generation.token_ids),
                    reward=self._reward(score, answer.version),
                    logprobs=tuple(generation.logprobs),
                    finished=generation.finish_reason == pb.FINISH_REASON_STOP,
                )
                for generation, score in zip(generations, answer.scores, strict=True)
            ),
            reference_reward=first.score - first.score_over_reference if prompt.reference else None,
            versions=tuple(sorted({span.version for generation in generations for span in generation.spans})),
            reward_version=answer.version,
        )

    def _reward(self, score: RewardScore, version: str) -> float:
        """The score, less what the model is unsure of: a lower bound of the reward, so that there is little to be had
        where it knows little (Coste et al., 2023, arXiv 2310.02743). Raises `errors.FailedPrecondition` where the
        model has no ensemble to say so.
        """
        if not self._pessimism:
            return score.score
        if not score.HasField("uncertainty"):
            raise errors.FailedPrecondition(
                f"{version} has no ensemble that says how unsure it is.",
                remedy="Set --reward-pessimism 0, or begin a reward model with --ensemble-heads.",
            )
        return score.score - self._pessimism * score.uncertainty

    def _refuse(self, prompt: Prompt, reason: str) -> None:
        logger.warning("prompt refused: %s", reason, extra={"task": self._task, "prompt": prompt.id})
        self._answers.put((prompt, None))


class _Pauses:
    """The pauses between attempts at one service: longer each time, and short again once it answers."""

    def __init__(self, service: str, task: str) -> None:
        self._service, self._task = service, task
        self._next = FIRST_PAUSE
        self._since: float | None = None
        metrics.AWAY.labels(task, service).set(0)

    async def wait(self, error: errors.ThumbwheelError) -> None:
        """Waits, and says why."""
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        metrics.AWAY.labels(self._task, self._service).set(1)
        metrics.ROLLOUT_RETRIES.labels(self._task, self._service).inc()
        logger.warning(
            "%s does not answer; rollouts wait: %s",
            self._service,
            error,
            extra={"task": self._task, "waited_seconds": round(now - self._since, 1)},
        )
        pause, self._next = self._next, min(2 * self._next, LAST_PAUSE)
        await asyncio.sleep(pause)

    def over(self) -> None:
        """It answers."""
        if self._since is not None:
            logger.info("%s answers again", self._service, extra={"task": self._task})
            metrics.AWAY.labels(self._task, self._service).set(0)
        self._since, self._next = None, FIRST_PAUSE


async def _spoken(stream: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """The stream, as long as something comes at least once in `SILENT_SECONDS`. Raises `errors.DeadlineExceeded`."""
    async with contextlib.aclosing(stream):
        while True:
            try:
                async with asyncio.timeout(SILENT_SECONDS):
                    item = await anext(stream, None)
            except TimeoutError:
                raise errors.DeadlineExceeded(f"Nothing came for {SILENT_SECONDS:g} s.") from None
            if item is None:
                return
            yield item
