"""The client that applications use: `AsyncClient` for asyncio, `Client` for everything else.

    client = Client()
    shown = client.candidates("How do I keep basil alive?", n=2)
    client.compare(shown.candidates[0], shown.candidates[1], "a", user_id="u1")

Every call has a deadline, which is never later than that of the call it is made on behalf of, and raises the classes of
`thumbwheel.errors`. A call that the server was away for, or that it asked to come again with, is tried again, with
growing pauses: feedback carries an idempotency key, so it counts once, and of a response nothing has been seen yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Self, TypeAlias, TypeVar

import grpc
import grpc.aio
import uuid_utils
from anyio.from_thread import BlockingPortal, start_blocking_portal

from thumbwheel import bulk, errors, tracing
from thumbwheel.calls import TENANT_KEY
from thumbwheel.channels import Attempts, Metadata, Pool, bearer, call_error, check_key, unary
from thumbwheel.tls import ClientTls
from thumbwheel.v1 import policy_pb2 as policy_pb
from thumbwheel.v1 import preference_pb2 as preference_pb
from thumbwheel.v1 import reward_pb2 as reward_pb
from thumbwheel.v1.policy_pb2_grpc import PolicyServiceStub
from thumbwheel.v1.preference_pb2_grpc import PreferenceServiceStub
from thumbwheel.v1.reward_pb2_grpc import RewardServiceStub

if TYPE_CHECKING:
    from thumbwheel.v1.policy_pb2_grpc import PolicyServiceAsyncStub
    from thumbwheel.v1.preference_pb2_grpc import PreferenceServiceAsyncStub
    from thumbwheel.v1.reward_pb2_grpc import RewardServiceAsyncStub

P = ParamSpec("P")
T = TypeVar("T")
Request = TypeVar("Request")
Response = TypeVar("Response")

Message: TypeAlias = tuple[Literal["system", "user", "assistant"], str]
"""A turn of a conversation: who speaks, and what."""

PromptLike: TypeAlias = "str | Sequence[Message] | policy_pb.Prompt"
"""A user's message, a conversation, or a `Prompt`."""

Choice: TypeAlias = Literal["a", "b", "tie", "both_bad"]
"""A verdict on two responses."""

Signal: TypeAlias = Literal["copied", "regenerated", "abandoned", "dwelled"]
"""What a user did with a response."""

_SIGNALS = {
    "copied": preference_pb.IMPLICIT_KIND_COPIED,
    "regenerated": preference_pb.IMPLICIT_KIND_REGENERATED,
    "abandoned": preference_pb.IMPLICIT_KIND_ABANDONED,
    "dwelled": preference_pb.IMPLICIT_KIND_DWELLED,
}
_ROLES = {"system": policy_pb.ROLE_SYSTEM, "user": policy_pb.ROLE_USER, "assistant": policy_pb.ROLE_ASSISTANT}
_CHOICES = {
    "a": preference_pb.PREFERENCE_A,
    "b": preference_pb.PREFERENCE_B,
    "tie": preference_pb.PREFERENCE_TIE,
    "both_bad": preference_pb.PREFERENCE_BOTH_BAD,
}


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


class AsyncClient:
    """Talks to policy, reward and collector. To be used inside one event loop; `async with` closes its channels."""

    def __init__(
        self,
        *,
        policy: str = "127.0.0.1:50051",
        reward: str = "127.0.0.1:50052",
        collector: str = "127.0.0.1:50053",
        control: str = "127.0.0.1:50063",
        tenant: str = "",
        timeout: float = 120.0,
        consent: bool | None = None,
        api_key: str = "",
        tls: ClientTls | None = None,
        connections: int = 1,
        allow_insecure: bool = False,
    ) -> None:
        """Addresses are "host:port", `control` that of the collector's control plane; `timeout` is the deadline of
        every call, in seconds, all attempts together.

        `consent` says of everything sent whether its user agrees that it is learnt from; None: they were not asked.
        `tenant` is "" for that of the API key. `connections` are kept to each service. Raises
        `errors.FailedPrecondition` for a certificate that cannot be used, and where `api_key` would leave this machine
        unencrypted, unless `allow_insecure`.
        """
        check_key(api_key, (policy, reward, collector, control), tls, allow_insecure=allow_insecure)
        self._timeout, self._consent = timeout, consent
        self._metadata: Metadata = (*(((TENANT_KEY, tenant),) if tenant else ()), *bearer(api_key))
        self._policy: Pool[PolicyServiceAsyncStub] = Pool(policy, PolicyServiceStub, size=connections, tls=tls)
        self._reward: Pool[RewardServiceAsyncStub] = Pool(reward, RewardServiceStub, size=connections, tls=tls)
        self._collector: Pool[PreferenceServiceAsyncStub] = Pool(
            collector, PreferenceServiceStub, size=connections, tls=tls
        )
        self._control: Pool[PreferenceServiceAsyncStub] = Pool(control, PreferenceServiceStub, size=1, tls=tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels."""
        for pool in (self._policy, self._reward, self._collector, self._control):
            await pool.close()

    async def _unary(self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        return await unary(method, request, timeout=self._timeout, metadata=self._metadata)

    async def generate(
        self,
        prompt: PromptLike,
        *,
        sampling: policy_pb.SamplingParams | None = None,
        user_id: str = "",
        version: str = "",
    ) -> policy_pb.Generation:
        """One response; `version` is "" for whichever is live."""
        request = policy_pb.GenerateRequest(
            prompt=to_prompt(prompt), sampling=sampling, user_id=user_id, version=version, consent=self._consent
        )
        return (await self._unary(self._policy.stub.Generate, request)).generation

    async def stream(
        self,
        prompt: PromptLike,
        *,
        sampling: policy_pb.SamplingParams | None = None,
        user_id: str = "",
        version: str = "",
    ) -> AsyncGenerator[policy_pb.GenerationDelta | policy_pb.Generation, None]:
        """One response in pieces, then whole. Leaving the loop early cancels the request."""
        request = policy_pb.GenerateStreamRequest(
            prompt=to_prompt(prompt), sampling=sampling, user_id=user_id, version=version, consent=self._consent
        )
        attempts, begun = Attempts(self._timeout), False
        # No span of its own: it would be the caller's current one between two pieces.
        metadata = (*self._metadata, *tracing.outgoing())
        while True:
            call = self._policy.stub.GenerateStream(request, timeout=attempts.left, metadata=metadata)
            try:
                async for message in call:
                    begun = True
                    yield message.finished if message.HasField("finished") else message.delta
                return
            except grpc.aio.AioRpcError as error:
                if begun:  # what was shown cannot be taken back, and another attempt would say something else
                    raise errors.from_rpc_error(error) from error
                await attempts.again(error)
            finally:
                call.cancel()

    async def candidates(
        self,
        prompt: PromptLike,
        *,
        n: int = 2,
        sampling: policy_pb.SamplingParams | None = None,
        user_id: str = "",
        version: str = "",
    ) -> policy_pb.GenerateCandidatesResponse:
        """`n` responses to one prompt, to be compared."""
        request = policy_pb.GenerateCandidatesRequest(
            prompt=to_prompt(prompt),
            sampling=sampling,
            n=n,
            user_id=user_id,
            version=version,
            consent=self._consent,
        )
        return await self._unary(self._policy.stub.GenerateCandidates, request)

    def bulk(
        self, requests: AsyncIterable[policy_pb.GenerateBulkRequest], *, timeout: float = 86_400.0
    ) -> AsyncGenerator[policy_pb.GenerateBulkResponse, None]:
        """Responses to many requests, as they are finished, behind what people ask for. Each has an id of its own.

        A server that stops midway hands over to the next: what it did not answer is asked again. `timeout` is for all.
        """

        def open_call(
            feed: AsyncIterator[policy_pb.GenerateBulkRequest], left: float
        ) -> grpc.aio.StreamStreamCall[policy_pb.GenerateBulkRequest, policy_pb.GenerateBulkResponse]:
            return self._policy.stub.GenerateBulk(feed, timeout=left, metadata=(*self._metadata, *tracing.outgoing()))

        return bulk.responses(open_call, requests, timeout=timeout)

    async def policy(self) -> policy_pb.GetPolicyResponse:
        """The live policy version, limits, and swaps so far."""
        return await self._unary(self._policy.stub.GetPolicy, policy_pb.GetPolicyRequest())

    async def reward(self) -> reward_pb.GetRewardResponse:
        """The live reward version, limits, and swaps so far."""
        return await self._unary(self._reward.stub.GetReward, reward_pb.GetRewardRequest())

    async def score(self, prompt: PromptLike, *responses: str) -> reward_pb.ScoreResponse:
        """Scores of responses to one prompt, all by one version."""
        asked = to_prompt(prompt)
        return await self.score_items([reward_pb.ScoreItem(prompt=asked, response=response) for response in responses])

    async def score_items(self, items: Sequence[reward_pb.ScoreItem]) -> reward_pb.ScoreResponse:
        """Scores of up to 256 items, all by one version."""
        return await self._unary(self._reward.stub.Score, reward_pb.ScoreRequest(items=items))

    async def score_stream(
        self, items: Sequence[reward_pb.ScoreItem]
    ) -> AsyncGenerator[reward_pb.ScoreStreamResponse, None]:
        """Scores of any number of items, in their order, each with the version that gave it. Raises our errors; what
        has come by then is the caller's to keep.
        """
        requests = (reward_pb.ScoreStreamRequest(item=item) for item in items)
        call = self._reward.stub.ScoreStream(
            requests, timeout=self._timeout, metadata=(*self._metadata, *tracing.outgoing())
        )
        try:
            async for response in call:
                yield response
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            raise call_error(error) from error
        finally:
            call.cancel()

    async def judge(self, prompt: PromptLike, a: str, b: str) -> reward_pb.CompareResponse:
        """The reward model's probability that `a` is preferred over `b`."""
        request = reward_pb.CompareRequest(prompt=to_prompt(prompt), response_a=a, response_b=b)
        return await self._unary(self._reward.stub.Compare, request)

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

    async def implicit(
        self,
        generation: policy_pb.Generation,
        kind: Signal,
        *,
        user_id: str,
        seconds: float | None = None,
        key: str = "",
    ) -> preference_pb.SubmitFeedbackResponse:
        """What a user did with a response: weak evidence. `seconds` belongs to "dwelled". Durable when it returns."""
        signal = preference_pb.ImplicitSignal(receipt=generation.receipt, kind=_SIGNALS[kind], seconds=seconds)
        return await self.submit(preference_pb.Feedback(user_id=user_id, idempotency_key=key, implicit=signal))

    async def submit(self, feedback: preference_pb.Feedback) -> preference_pb.SubmitFeedbackResponse:
        """Any feedback; gives it an idempotency key if it has none, so that a retry is not counted twice."""
        self._complete(feedback)
        request = preference_pb.SubmitFeedbackRequest(feedback=feedback)
        return await self._unary(self._collector.stub.SubmitFeedback, request)

    def _complete(self, feedback: preference_pb.Feedback) -> None:
        if not feedback.idempotency_key:
            feedback.idempotency_key = str(uuid_utils.uuid7())
        if self._consent is not None and not feedback.HasField("consent"):
            feedback.consent = self._consent

    async def submit_batch(self, feedback: Sequence[preference_pb.Feedback]) -> list[preference_pb.FeedbackResult]:
        """Any number of pieces; what became of each, in their order. Keys are given as `submit` gives them."""
        results: list[preference_pb.FeedbackResult] = []
        for one in feedback:
            self._complete(one)
        for start in range(0, len(feedback), 1000):
            request = preference_pb.SubmitFeedbackBatchRequest(feedback=feedback[start : start + 1000])
            results.extend((await self._unary(self._collector.stub.SubmitFeedbackBatch, request)).results)
        return results

    async def list_feedback(self, request: preference_pb.ListFeedbackRequest) -> preference_pb.ListFeedbackResponse:
        """A page of feedback by state, reason, user and prompt, newest first."""
        return await self._unary(self._collector.stub.ListFeedback, request)

    async def guidelines(self, version: str = "") -> preference_pb.GetGuidelinesResponse:
        """What to show people before they judge; the newest version where none is named."""
        request = preference_pb.GetGuidelinesRequest(version=version)
        return await self._unary(self._collector.stub.GetGuidelines, request)

    async def next_comparison(self, user_id: str) -> preference_pb.NextComparisonResponse:
        """Two responses worth comparing that this user has not seen; show `a` first. Raises `errors.NotFound`."""
        request = preference_pb.NextComparisonRequest(user_id=user_id)
        return await self._unary(self._collector.stub.NextComparison, request)

    async def retract(self, feedback_id: str, *, user_id: str) -> preference_pb.FeedbackRecord:
        """Takes feedback back."""
        request = preference_pb.RetractRequest(feedback_id=feedback_id, user_id=user_id)
        return (await self._unary(self._collector.stub.Retract, request)).record

    async def forget(self, user_id: str) -> preference_pb.ForgetResponse:
        """Erases all of a user's content; returns when it is off the collector's disk. Of the control plane."""
        return await self._unary(self._control.stub.Forget, preference_pb.ForgetRequest(user_id=user_id))

    async def feedback(self, feedback_ids: Sequence[str]) -> list[preference_pb.FeedbackRecord]:
        """What became of feedback."""
        records: list[preference_pb.FeedbackRecord] = []
        for start in range(0, len(feedback_ids), 1000):
            request = preference_pb.GetFeedbackRequest(feedback_ids=feedback_ids[start : start + 1000])
            records.extend((await self._unary(self._collector.stub.GetFeedback, request)).records)
        return records


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The method as `Client` has it: the same arguments and result, but it blocks."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = self._portal.call(lambda: method(self._client, *args, **kwargs))
        return result

    return call


class Client:
    """`AsyncClient` for code without an event loop: the same methods, with the same arguments, that block.

    Its calls run on an event loop in a thread of its own, so one client may serve many threads.
    """

    def __init__(self, **options: Any) -> None:
        """Takes what `AsyncClient` takes."""
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal = self._stack.enter_context(start_blocking_portal())
        try:
            self._client: AsyncClient = self._portal.call(lambda: _make(options))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels and ends the thread."""
        self._portal.call(self._client.close)
        self._stack.close()

    def stream(
        self,
        prompt: PromptLike,
        *,
        sampling: policy_pb.SamplingParams | None = None,
        user_id: str = "",
        version: str = "",
    ) -> Iterator[policy_pb.GenerationDelta | policy_pb.Generation]:
        """One response in pieces, then whole. Leaving the loop early cancels the request."""
        pieces = self._client.stream(prompt, sampling=sampling, user_id=user_id, version=version)
        try:
            while True:
                try:
                    yield self._portal.call(pieces.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(pieces.aclose)

    generate = _blocking(AsyncClient.generate)
    candidates = _blocking(AsyncClient.candidates)
    policy = _blocking(AsyncClient.policy)
    reward = _blocking(AsyncClient.reward)
    score = _blocking(AsyncClient.score)
    score_items = _blocking(AsyncClient.score_items)
    judge = _blocking(AsyncClient.judge)
    compare = _blocking(AsyncClient.compare)
    thumb = _blocking(AsyncClient.thumb)
    edit = _blocking(AsyncClient.edit)
    comment = _blocking(AsyncClient.comment)
    implicit = _blocking(AsyncClient.implicit)
    submit = _blocking(AsyncClient.submit)
    submit_batch = _blocking(AsyncClient.submit_batch)
    list_feedback = _blocking(AsyncClient.list_feedback)
    guidelines = _blocking(AsyncClient.guidelines)
    next_comparison = _blocking(AsyncClient.next_comparison)
    retract = _blocking(AsyncClient.retract)
    forget = _blocking(AsyncClient.forget)
    feedback = _blocking(AsyncClient.feedback)


async def _make(options: dict[str, Any]) -> AsyncClient:
    return AsyncClient(**options)  # its channels belong to the loop they are made in
