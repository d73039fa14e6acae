"""Exact and near duplicate prompts: which prompts are curated as one."""

from __future__ import annotations

from services.collector.curation.settings import CurationSettings


class PromptGroups:
    """Groups prompts as they arrive. A prompt's group is the id of the first prompt like it, and never changes."""

    def __init__(self, settings: CurationSettings | None = None) -> None: ...

    def add(self, tenant: str, prompt_id: str, text: str) -> str:
        """The prompt's group, `prompt_id` itself where it is the first of its kind. The same prompt again: the same.

        `text` is the conversation as one text. Tenants never share a group. To build the index anew after a
        restart, add the prompts again in the same order.
        """
        raise NotImplementedError
