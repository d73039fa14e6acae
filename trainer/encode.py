"""From the records of a file to samples: text and messages into token ids, as the serving side does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thumbwheel import errors
from trainer import runtime
from trainer.dataset import VERDICTS, Content, Record
from trainer.samples import Demonstration, Group, Pair, Rollout, Sample, Thumb, Tokens


class RecordEncoder:
    """Turns records into samples, with the tokenizer of a base model."""

    def __init__(self, tokenizer: Any, vocab_size: int, *, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_length = max_length

    def sample(self, record: Record) -> Sample:
        """The sample of a record. Raises `errors.InvalidArgument` and `errors.FailedPrecondition`."""
        fields = record.fields
        finished = fields.get("finished", [True] * len(record.responses))
        responses = tuple(
            self._response(content, ended) for content, ended in zip(record.responses, finished, strict=True)
        )
        prompt = self._fitting(record, self._prompt(record), responses)
        common = {"id": fields.get("id", record.where), "prompt": prompt, "weight": float(fields.get("weight", 1.0))}
        if record.kind is Pair:
            return Pair(
                **common,
                chosen=responses[0],
                rejected=responses[1],
                tie=fields.get("tie", False),
                margin=float(fields.get("margin", 0.0)),
                aspects=tuple((aspect, VERDICTS[said]) for aspect, said in sorted(fields.get("aspects", {}).items())),
                source=fields.get("source", ""),
            )
        if record.kind is Thumb:
            return Thumb(**common, response=responses[0], liked=fields["label"])
        if record.kind is Demonstration:
            return Demonstration(**common, response=responses[0])
        logprobs = fields.get("logprobs") or [()] * len(responses)
        parts = zip(responses, fields["rewards"], logprobs, finished, strict=True)
        return Group(
            **common,
            rollouts=tuple(Rollout(ids, float(reward), tuple(known), ended) for ids, reward, known, ended in parts),
            reference_reward=fields.get("reference_reward"),
        )

    def _fitting(self, record: Record, prompt: Tokens, responses: Sequence[Tokens]) -> Tokens:
        """The prompt, without its beginning where it is too long."""
        top = max(map(max, (prompt, *responses)))
        if top >= self._vocab_size:
            raise record.error("token ids", f"have {top}, but the vocabulary ends at {self._vocab_size - 1}.")
        longest = max(map(len, responses))
        if longest >= self._max_length:
            raise record.error(
                "response",
                f"has {longest} tokens and leaves no room for a prompt in {self._max_length}.",
                "Raise --max-length, or leave the line out.",
            )
        return prompt[-(self._max_length - longest) :]

    def _prompt(self, record: Record) -> Tokens:
        content = record.prompt
        if isinstance(content, str):
            return self._plain(content)
        if isinstance(content[0], int):
            return tuple(content)
        if not self._tokenizer.chat_template:
            raise errors.FailedPrecondition(
                f"{record.where} has messages, but the base model has no chat template.",
                remedy="Choose a chat model, or give prompts as text.",
            )
        ids = self._tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
        return tuple(int(token) for token in ids)

    def _response(self, content: Content, ended: bool) -> Tokens:
        if not isinstance(content, str) and isinstance(content[0], int):
            return tuple(content)
        ids = self._plain(content if isinstance(content, str) else content[0]["content"])
        return (*ids, int(self._tokenizer.eos_token_id)) if ended else ids

    def _plain(self, text: str) -> Tokens:
        return tuple(int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"])


def record_encoder(base_model: Path, max_length: int) -> RecordEncoder:
    """The encoder of the model in a folder. Raises `errors.FailedPrecondition` where its tokenizer does not do."""
    runtime.choose_accelerator()
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base_model))
    if tokenizer.eos_token_id is None:
        raise errors.FailedPrecondition(
            f"{base_model}: the tokenizer has no end-of-text token.", remedy="Set eos_token in tokenizer_config.json."
        )
    vocab_size = int(AutoConfig.from_pretrained(str(base_model)).vocab_size)
    return RecordEncoder(tokenizer, vocab_size, max_length=max_length)
