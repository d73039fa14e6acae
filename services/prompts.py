"""From what an application sends to the token ids a model sees, with every way of getting it wrong named by field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thumbwheel import errors
from thumbwheel.v1.policy_pb2 import Chat, Prompt, Role

_NAMES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}


def chat_messages(chat: Chat, *, field: str) -> list[dict[str, str]]:
    """The turns as a chat template takes them. Raises `errors.InvalidArgument` naming the turn that is wrong."""
    if not chat.messages:
        raise errors.InvalidArgument("is empty.", field=f"{field}.messages", remedy="Add a user message.")
    for index, message in enumerate(chat.messages):
        where = f"{field}.messages[{index}]"
        if message.role not in _NAMES:
            raise errors.InvalidArgument(
                f"is {message.role}, which is no role.",
                field=f"{where}.role",
                remedy="Use ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT.",
            )
        if message.role == Role.ROLE_SYSTEM and index > 0:
            raise errors.InvalidArgument("is ROLE_SYSTEM.", field=f"{where}.role", remedy="Only the first may be.")
        if not message.content.strip():
            raise errors.InvalidArgument(
                "is empty.", field=f"{where}.content", remedy="Say something, or leave it out."
            )
    if chat.messages[-1].role != Role.ROLE_USER:
        raise errors.InvalidArgument(
            "is not the user's.", field=f"{field}.messages[{len(chat.messages) - 1}].role", remedy="End with ROLE_USER."
        )
    return [{"role": _NAMES[message.role], "content": message.content} for message in chat.messages]


class PromptEncoder:
    """A version's tokenizer and chat template. One serves all versions: a swap refuses another tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.vocab_size = len(self.tokenizer)

    def encode(self, prompt: Prompt, *, field: str = "prompt") -> list[int]:
        """Token ids of a prompt, with the cue for the assistant's turn. Raises `errors.InvalidArgument`."""
        kind = prompt.WhichOneof("content")
        if kind == "chat":
            messages = chat_messages(prompt.chat, field=f"{field}.chat")
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            return [int(token) for token in ids]
        if kind == "text":
            if not prompt.text.strip():
                raise errors.InvalidArgument("is empty.", field=f"{field}.text", remedy="Say something.")
            return self._plain(prompt.text)
        if kind == "tokens":
            ids = list(prompt.tokens.ids)
            if not ids:
                raise errors.InvalidArgument("is empty.", field=f"{field}.tokens.ids", remedy="Add token ids.")
            if (top := max(ids)) >= self.vocab_size:
                raise errors.InvalidArgument(
                    f"has {top}, but the vocabulary ends at {self.vocab_size - 1}.", field=f"{field}.tokens.ids"
                )
            return ids
        raise errors.InvalidArgument("is missing.", field=field, remedy="Set chat, text or tokens.")

    def encode_scored(self, prompt: Prompt, response: str, *, limit: int, field: str, response_field: str) -> list[int]:
        """Token ids of a prompt, a response to it and the end-of-text token, at which a reward model is read: at most
        `limit`. Of a dialogue that is longer the beginning is cut, and the last reply is whole.

        The trainer builds the same sequence (`trainer.batch`), so that what is learnt is what is asked. Raises
        `errors.InvalidArgument`, also for a response that leaves no room for a prompt.
        """
        if not response:
            raise errors.InvalidArgument("is empty.", field=response_field, remedy="There is nothing to score.")
        read = self.encode(prompt, field=field)
        reply = [*self._plain(response), self.tokenizer.eos_token_id]
        check_length(reply, limit - 1, field=response_field)
        return [*read[-(limit - len(reply)) :], *reply]

    def _plain(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def check_length(ids: Sequence[int], limit: int, *, field: str) -> None:
    """Raises `errors.InvalidArgument` where a sequence is longer than the model can take."""
    if len(ids) > limit:
        raise errors.InvalidArgument(
            f"has {len(ids)} tokens, but at most {limit} fit.", field=field, remedy="Shorten it."
        )
