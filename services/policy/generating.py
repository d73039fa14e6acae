"""One response: through the engine, into a `Generation` with its receipt, and onto the stream."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uuid_utils
from prometheus_client import Counter

from services.engine import Engine
from services.policy import sampling
from services.policy.recording import Recorder
from services.prompts import PromptEncoder
from thumbwheel import errors
from thumbwheel.auth import ReceiptKey
from thumbwheel.v1 import policy_pb2 as pb
from thumbwheel.v1.events_pb2 import GenerationEvent

TOKENS = Counter("thumbwheel_policy_tokens_total", "Tokens, by kind.", ["kind"])
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH, "abort": pb.FINISH_REASON_ABORT}
MAX_USER_ID = 128
STABLE = "stable"

# vLLM takes the lowest first, and makes the highest wait where memory runs out.
PEOPLE, BULK = 0, 1


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    max_tokens: int


@dataclass(frozen=True)
class Asked:
    """A request that has been checked: what the engine and the record need of it."""

    tenant: str
    user_id: str
    prompt: pb.Prompt
    prompt_id: str
    prompt_ids: Sequence[int]
    params: pb.SamplingParams
    candidate_count: int = 1
    bulk: bool = False
    consent: bool | None = None


class Generating:
    """Runs requests on the engine. Whoever stops listening aborts what it asked for, at the engine's next step."""

    def __init__(
        self, *, engine: Engine, encoder: PromptEncoder, recorder: Recorder, key: ReceiptKey, limits: Limits
    ) -> None:
        self.engine, self.limits = engine, limits
        self._encoder, self.recorder, self._key = encoder, recorder, key

    def check(
        self,
        prompt: pb.Prompt,
        given: pb.SamplingParams,
        *,
        tenant: str,
        user_id: str = "",
        version: str = "",
        consent: bool | None = None,
        count: int = 1,
        stream: bool = False,
        bulk: bool = False,
    ) -> Asked:
        """The request, with defaults filled in. Raises `errors.InvalidArgument` naming the field that is wrong, and
        `errors.FailedPrecondition` for a version that is not loaded here.
        """
        if version not in ("", STABLE, self.engine.version):
            raise errors.FailedPrecondition(
                f"Version {version[:128]!r} is not loaded here; {self.engine.version} is.",
                remedy="Leave `version` out, or ask a server that has it: GetPolicy lists what one has.",
            )
        if len(user_id) > MAX_USER_ID:
            raise errors.InvalidArgument(
                f"has {len(user_id)} characters; at most {MAX_USER_ID} are allowed.", field="user_id"
            )
        params = sampling.resolve(given, max_tokens=self.limits.max_tokens, vocab_size=self._encoder.vocab_size)
        if stream and params.HasField("prompt_logprobs"):
            raise errors.InvalidArgument(
                "is not for streams.", field="sampling.prompt_logprobs", remedy="Use Generate."
            )
        ids = self._encoder.encode(prompt)
        room = self.limits.max_model_len - len(ids)
        if room < 1:
            raise errors.InvalidArgument(
                f"has {len(ids)} tokens; with at least one of response, at most {self.limits.max_model_len} fit.",
                field="prompt",
                remedy="Shorten it.",
            )
        if params.min_tokens > room:
            raise errors.InvalidArgument(
                f"is {params.min_tokens}, but only {room} tokens fit after the prompt.", field="sampling.min_tokens"
            )
        params.max_tokens = min(params.max_tokens, room)
        return Asked(
            tenant=tenant,
            user_id=user_id,
            prompt=prompt,
            prompt_id=str(uuid_utils.uuid7()),
            prompt_ids=ids,
            params=params,
            candidate_count=count,
            bulk=bulk,
            consent=consent,
        )

    async def all(self, asked: Asked) -> list[pb.Generation]:
        """All responses that were asked for, in order. They run together and share the prompt's KV cache."""
        if asked.candidate_count == 1:
            return [await self._whole(asked, 0)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._whole(asked, index)) for index in range(asked.candidate_count)]
        except BaseExceptionGroup as several:
            known, other = several.split(errors.ThumbwheelError)
            if known is None or other is not None:
                raise
            raise known.exceptions[0] from None  # one refusal is as good as several
        return [task.result() for task in tasks]

    async def _whole(self, asked: Asked, index: int) -> pb.Generation:
        async for piece in self.pieces(asked, index, stream=False):
            if isinstance(piece, pb.Generation):
                return piece
        raise errors.Internal("The engine ended a request without a response.")

    async def pieces(
        self, asked: Asked, index: int, *, stream: bool, coalesce: float = 0.0
    ) -> AsyncIterator[pb.GenerationDelta | pb.Generation]:
        """Deltas as they come, at most one in `coalesce` seconds, then the finished generation."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        generation = pb.Generation(
            generation_id=str(uuid_utils.uuid7()), prompt_id=asked.prompt_id, prompt_tokens=len(asked.prompt_ids)
        )
        # Plain lists until the end: this runs for each token of each stream, and fields of messages are slow.
        texts: list[str] = []
        ids: list[int] = []
        logprobs: list[float] = []
        likeliest: list[pb.TokenLogprobs] = []
        try:
            async for output in self.engine.llm.generate(
                tokens_input(list(asked.prompt_ids)),  # not to be tokenized, so no thread of vLLM's is asked
                sampling.to_vllm(asked.params, stream=stream, seed_offset=index),
                generation.generation_id,
                priority=BULK if asked.bulk else PEOPLE,
            ):
                completion = output.outputs[0]
                text, new_ids = completion.text, completion.token_ids
                new_logprobs, new_likeliest = _logprobs(completion, asked.params.top_logprobs)
                texts.append(text)
                ids.extend(new_ids)
                logprobs.extend(new_logprobs)
                likeliest.extend(new_likeliest)
                if stream and (new_ids or text):
                    yield pb.GenerationDelta(
                        text=text, token_ids=new_ids, logprobs=new_logprobs, top_logprobs=new_likeliest
                    )
                if completion.finish_reason is not None:
                    generation.text = "".join(texts)
                    generation.token_ids.extend(ids)
                    generation.logprobs.extend(logprobs)
                    generation.top_logprobs.extend(likeliest)
                    _add_prompt_logprobs(generation, asked, output.prompt_logprobs)
                    self._finish(asked, index, generation, completion)
                    yield generation
                    return
                if coalesce and stream:
                    # Meanwhile vLLM puts together what it has for us.
                    await asyncio.sleep(coalesce)
        except VLLMClientError as error:
            raise sampling.refused(error, asked.params) from error

    def _finish(self, asked: Asked, index: int, generation: pb.Generation, completion: Any) -> None:
        """Fills in what is known at the end, signs the receipt, and hands the event to the recorder."""
        generation.finish_reason = _FINISH.get(completion.finish_reason, pb.FINISH_REASON_ABORT)
        for span in completion.weight_versions or ():
            generation.spans.add(version=span.version, start=span.start, end=span.end)
        claims = pb.ReceiptClaims(
            tenant=asked.tenant,
            generation_id=generation.generation_id,
            prompt_id=asked.prompt_id,
            prompt_sha256=prompt_sha256(asked.prompt_ids),
            response_sha256=hashlib.sha256(generation.text.encode()).digest(),
            version=generation.spans[-1].version if generation.spans else self.engine.version,
        )
        claims.issued_at.GetCurrentTime()
        if not asked.bulk:  # nobody is shown it, so nobody can judge it
            generation.receipt.CopyFrom(self._key.sign(claims))
        TOKENS.labels("prompt").inc(len(asked.prompt_ids))
        TOKENS.labels("response").inc(len(generation.token_ids))
        event = GenerationEvent(
            event_id=generation.generation_id,
            tenant=asked.tenant,
            user_id=asked.user_id,
            prompt=asked.prompt,
            prompt_token_ids=asked.prompt_ids,
            generation=generation,
            sampling=asked.params,
            candidate_index=index,
            candidate_count=asked.candidate_count,
            finished_at=claims.issued_at,
            # One version is loaded, so every request of a person is answered by it.
            shown_probability=None if asked.bulk else 1.0,
            bulk=asked.bulk,
            consent=asked.consent,
        )
        for name in ("top_logprobs", "prompt_logprobs", "prompt_top_logprobs"):
            event.generation.ClearField(name)
        self.recorder.record(event)


def _logprobs(completion: Any, top: int) -> tuple[Sequence[float], Sequence[pb.TokenLogprobs]]:
    """Log-probabilities of the tokens that a step brought, and the `top` likeliest of each place."""
    steps = completion.logprobs
    if not steps:
        return (), ()
    if not top:
        return steps.logprobs, ()  # vLLM's flat form: with none but the sampled token's, one a token
    sampled = [step[token].logprob for token, step in zip(completion.token_ids, steps, strict=True)]
    return sampled, [_likeliest(step, top) for step in steps]


def _likeliest(step: Mapping[int, Any], top: int) -> pb.TokenLogprobs:
    ranked = sorted(step.items(), key=lambda item: item[1].rank)[:top]
    return pb.TokenLogprobs(token_ids=[token for token, _ in ranked], logprobs=[one.logprob for _, one in ranked])


def _add_prompt_logprobs(generation: pb.Generation, asked: Asked, steps: Sequence[Mapping[int, Any]]) -> None:
    if not asked.params.HasField("prompt_logprobs"):
        return
    top = asked.params.prompt_logprobs
    for token, step in zip(asked.prompt_ids, steps, strict=True):
        # Of the first token nothing is known: nothing comes before it.
        generation.prompt_logprobs.append(step[token].logprob if step else 0.0)
        if top:
            generation.prompt_top_logprobs.append(_likeliest(step, top) if step else pb.TokenLogprobs())


def prompt_sha256(ids: Sequence[int]) -> bytes:
    """SHA-256 of a prompt as the model saw it: its token ids as little-endian uint32."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()
