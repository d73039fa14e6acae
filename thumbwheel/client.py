"""The client that applications use: `AsyncClient` for asyncio, `Client` for everything else.

    client = Client()
    shown = client.candidates("How do I keep basil alive?", n=2)
    client.compare(shown.candidates[0], shown.candidates[1], "a", user_id="u1")

Every call has a deadline and raises the classes of `thumbwheel.errors`. A call that the server was away for is tried
again with growing pauses; that is safe, since feedback carries an idempotency key.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import grpc
import grpc.aio
import uuid_utils
from anyio.from_thread import BlockingPortal, start_blocking_portal

from thumbwheel import errors
from thumbwheel.serving import DEFAULT_TENANT, MAX_MESSAGE_BYTES, TENANT_KEY
from thumbwheel.v1 import policy_pb2 as policy_pb
from thumbwheel.v1 import preference_pb2 as preference_pb
from thumbwheel.v1 import reward_pb2 as reward_pb
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceStub
from thumbwheel.v1.preference_pb2_grpc import PreferenceServiceStub
from thumbwheel.v1.reward_pb2_grpc import RewardServiceStub

Message: TypeAlias = tuple[Literal["system", "user", "assistant"], str]
"""A turn of a conversation: who speaks, and what."""

PromptLike: TypeAlias = "str | Sequence[Message] | policy_pb.Prompt"
"""A user's message, a conversation, or a `Prompt`."""

Choice: TypeAlias = Literal["a", "b", "tie", "both_bad"]
"""A verdict on two responses."""

_ROLES = {"system": policy_pb.ROLE_SYSTEM, "user": policy_pb.ROLE_USER, "assistant": policy_pb.ROLE_ASSISTANT}
_CHOICES = {
    "a": preference_pb.PREFERENCE_A,
    "b": preference_pb.PREFERENCE_B,
    "tie": preference_pb.PREFERENCE_TIE,
    "both_bad": preference_pb.PREFERENCE_BOTH_BAD,
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 30_000),
]


def to_prompt(prompt: PromptLike) -> policy_pb.Prompt:
    """A `Prompt` of whatever was given; a string is a user's message."""
    if isinstance(prompt, policy_pb.Prompt):
        return prompt
    turns: Sequence[Message] = [("user", prompt)] if isinstance(prompt, str) else prompt
    messages = []
    for index, (role, content) in enumerate(turns):
        if role not in _ROLES:
            raise errors.InvalidArgument(
                f"is {role!r}.", field=f"prompt.chat.messages[{index}].role", remedy=f"Use one of {', '.join(_ROLES)}."
            )
        messages.append(policy_pb.ChatMessage(role=_ROLES[role], content=content))
    return policy_pb.Prompt(chat=policy_pb.Chat(messages=messages))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise errors.from_rpc_error(error) from error


class AsyncClient:
    """Talks to policy, reward and collector. To be used inside one event loop; `async with` closes its channels."""

    def __init__(
        self,
        *,
        policy: str = "127.0.0.1:50051",
        reward: str = "127.0.0.1:50052",
        collector: str = "127.0.0.1:50053",
        tenant: str = DEFAULT_TENANT,
        timeout: float = 120.0,
    ) -> None:
        """Addresses are "host:port"; `timeout` is the deadline of every call, in seconds."""
        self._channels = [
            grpc.aio.insecure_channel(address, options=_OPTIONS) for address in (policy, reward, collector)
        ]
        self._policy = PolicyServiceStub(self._channels[0])
        self._reward = RewardServiceStub(self._channels[1])
        self._collector = PreferenceServiceStub(self._channels[2])
        self._call: dict[str, Any] = {"timeout": timeout, "metadata": ((TENANT_KEY, tenant),)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()

    async def generate(
        self, prompt: PromptLike, *, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> policy_pb.Generation:
        """One response."""
        request = policy_pb.GenerateRequest(prompt=to_prompt(prompt), sampling=sampling, user_id=user_id)
        with _translated():
            return (await self._policy.Generate(request, **self._call)).generation

    async def stream(
        self, prompt: PromptLike, *, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> AsyncGenerator[policy_pb.GenerationDelta | policy_pb.Generation, None]:
        """One response in pieces, then whole. Leaving the loop early cancels the request."""
        request = policy_pb.GenerateStreamRequest(prompt=to_prompt(prompt), sampling=sampling, user_id=user_id)
        call = self._policy.GenerateStream(request, **self._call)
        try:
            with _translated():
                async for message in call:
                    yield message.finished if message.HasField("finished") else message.delta
        finally:
            call.cancel()

    async def candidates(
        self, prompt: PromptLike, *, n: int = 2, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> policy_pb.GenerateCandidatesResponse:
        """`n` responses to one prompt, to be compared."""
        request = policy_pb.GenerateCandidatesRequest(prompt=to_prompt(prompt), sampling=sampling, n=n, user_id=user_id)
        with _translated():
            return await self._policy.GenerateCandidates(request, **self._call)

    async def policy(self) -> policy_pb.GetPolicyResponse:
        """The live policy version, limits, and swaps so far."""
        with _translated():
            return await self._policy.GetPolicy(policy_pb.GetPolicyRequest(), **self._call)

    async def reward(self) -> reward_pb.GetRewardResponse:
        """The live reward version, limits, and swaps so far."""
        with _translated():
            return await self._reward.GetReward(reward_pb.GetRewardRequest(), **self._call)

    async def score(self, prompt: PromptLike, *responses: str) -> reward_pb.ScoreResponse:
        """Scores of responses to one prompt, all by one version."""
        asked = to_prompt(prompt)
        return await self.score_items([reward_pb.ScoreItem(prompt=asked, response=response) for response in responses])

    async def score_items(self, items: Sequence[reward_pb.ScoreItem]) -> reward_pb.ScoreResponse:
        """Scores of up to 256 items, all by one version."""
        with _translated():
            return await self._reward.Score(reward_pb.ScoreRequest(items=items), **self._call)

    async def judge(self, prompt: PromptLike, a: str, b: str) -> reward_pb.CompareResponse:
        """The reward model's probability that `a` is preferred over `b`."""
        request = reward_pb.CompareRequest(prompt=to_prompt(prompt), response_a=a, response_b=b)
        with _translated():
            return await self._reward.Compare(request, **self._call)

    async def compare(
        self,
        a: policy_pb.Generation,
        b: policy_pb.Generation,
        choice: Choice,
        *,
        user_id: str,
        aspects: dict[str, Choice] | None = None,
        key: str = "",
    ) -> preference_pb.SubmitFeedbackResponse:
        """Says which of two responses is better; `a` was shown first. Durable when it returns."""
        judged = [
            preference_pb.AspectPreference(aspect=aspect, preference=_CHOICES[verdict])
            for aspect, verdict in (aspects or {}).items()
        ]
        comparison = preference_pb.Comparison(a=a.receipt, b=b.receipt, preference=_CHOICES[choice], aspects=judged)
        return await self.submit(preference_pb.Feedback(user_id=user_id, idempotency_key=key, comparison=comparison))

    async def thumb(
        self, generation: policy_pb.Generation, *, up: bool, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """A thumb up or down. Durable when it returns."""
        value = preference_pb.THUMB_VALUE_UP if up else preference_pb.THUMB_VALUE_DOWN
        thumb = preference_pb.Thumb(receipt=generation.receipt, value=value)
        return await self.submit(preference_pb.Feedback(user_id=user_id, idempotency_key=key, thumb=thumb))

    async def edit(
        self, generation: policy_pb.Generation, text: str, *, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """A better answer, written by the user. Durable when it returns."""
        edit = preference_pb.Edit(receipt=generation.receipt, text=text)
        return await self.submit(preference_pb.Feedback(user_id=user_id, idempotency_key=key, edit=edit))

    async def comment(
        self, generation: policy_pb.Generation, text: str, *, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """Words about a response. Durable when it returns."""
        comment = preference_pb.Comment(receipt=generation.receipt, text=text)
        return await self.submit(preference_pb.Feedback(user_id=user_id, idempotency_key=key, comment=comment))

    async def submit(self, feedback: preference_pb.Feedback) -> preference_pb.SubmitFeedbackResponse:
        """Any feedback; gives it an idempotency key if it has none, so that a retry is not counted twice."""
        if not feedback.idempotency_key:
            feedback.idempotency_key = str(uuid_utils.uuid7())
        request = preference_pb.SubmitFeedbackRequest(feedback=feedback)
        with _translated():
            return await self._collector.SubmitFeedback(request, **self._call)

    async def retract(self, feedback_id: str, *, user_id: str) -> preference_pb.FeedbackRecord:
        """Takes feedback back."""
        request = preference_pb.RetractRequest(feedback_id=feedback_id, user_id=user_id)
        with _translated():
            return (await self._collector.Retract(request, **self._call)).record

    async def feedback(self, feedback_ids: Sequence[str]) -> list[preference_pb.FeedbackRecord]:
        """What became of feedback."""
        records: list[preference_pb.FeedbackRecord] = []
        with _translated():
            for start in range(0, len(feedback_ids), 1000):
                request = preference_pb.GetFeedbackRequest(feedback_ids=feedback_ids[start : start + 1000])
                records.extend((await self._collector.GetFeedback(request, **self._call)).records)
        return records


class Client:
    """`AsyncClient` for code without an event loop: the same methods, with the same arguments, that block.

    Its calls run on an event loop in a thread of its own, so one client may serve many threads.
    """

    def __init__(self, **options: Any) -> None:
        """Takes what `AsyncClient` takes."""
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal = self._stack.enter_context(start_blocking_portal())
        self._client: AsyncClient = self._portal.call(lambda: _make(options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels and ends the thread."""
        self._portal.call(self._client.close)
        self._stack.close()

    def generate(
        self, prompt: PromptLike, *, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> policy_pb.Generation:
        """One response."""
        return self._portal.call(lambda: self._client.generate(prompt, sampling=sampling, user_id=user_id))

    def stream(
        self, prompt: PromptLike, *, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> Iterator[policy_pb.GenerationDelta | policy_pb.Generation]:
        """One response in pieces, then whole."""
        pieces = self._client.stream(prompt, sampling=sampling, user_id=user_id)
        while True:
            try:
                yield self._portal.call(pieces.__anext__)
            except StopAsyncIteration:
                return

    def candidates(
        self, prompt: PromptLike, *, n: int = 2, sampling: policy_pb.SamplingParams | None = None, user_id: str = ""
    ) -> policy_pb.GenerateCandidatesResponse:
        """`n` responses to one prompt, to be compared."""
        return self._portal.call(lambda: self._client.candidates(prompt, n=n, sampling=sampling, user_id=user_id))

    def policy(self) -> policy_pb.GetPolicyResponse:
        """The live policy version, limits, and swaps so far."""
        return self._portal.call(self._client.policy)

    def reward(self) -> reward_pb.GetRewardResponse:
        """The live reward version, limits, and swaps so far."""
        return self._portal.call(self._client.reward)

    def score(self, prompt: PromptLike, *responses: str) -> reward_pb.ScoreResponse:
        """Scores of responses to one prompt, all by one version."""
        return self._portal.call(lambda: self._client.score(prompt, *responses))

    def judge(self, prompt: PromptLike, a: str, b: str) -> reward_pb.CompareResponse:
        """The reward model's probability that `a` is preferred over `b`."""
        return self._portal.call(lambda: self._client.judge(prompt, a, b))

    def compare(
        self,
        a: policy_pb.Generation,
        b: policy_pb.Generation,
        choice: Choice,
        *,
        user_id: str,
        aspects: dict[str, Choice] | None = None,
        key: str = "",
    ) -> preference_pb.SubmitFeedbackResponse:
        """Says which of two responses is better; `a` was shown first. Durable when it returns."""
        return self._portal.call(lambda: self._client.compare(a, b, choice, user_id=user_id, aspects=aspects, key=key))

    def submit(self, feedback: preference_pb.Feedback) -> preference_pb.SubmitFeedbackResponse:
        """Any feedback. Durable when it returns."""
        return self._portal.call(self._client.submit, feedback)

    def thumb(
        self, generation: policy_pb.Generation, *, up: bool, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """A thumb up or down. Durable when it returns."""
        return self._portal.call(lambda: self._client.thumb(generation, up=up, user_id=user_id, key=key))

    def edit(
        self, generation: policy_pb.Generation, text: str, *, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """A better answer, written by the user. Durable when it returns."""
        return self._portal.call(lambda: self._client.edit(generation, text, user_id=user_id, key=key))

    def comment(
        self, generation: policy_pb.Generation, text: str, *, user_id: str, key: str = ""
    ) -> preference_pb.SubmitFeedbackResponse:
        """Words about a response. Durable when it returns."""
        return self._portal.call(lambda: self._client.comment(generation, text, user_id=user_id, key=key))

    def retract(self, feedback_id: str, *, user_id: str) -> preference_pb.FeedbackRecord:
        """Takes feedback back."""
        return self._portal.call(lambda: self._client.retract(feedback_id, user_id=user_id))

    def feedback(self, feedback_ids: Sequence[str]) -> list[preference_pb.FeedbackRecord]:
        """What became of feedback."""
        return self._portal.call(self._client.feedback, feedback_ids)


async def _make(options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(**options)  # its channels belong to the loop they are made in
