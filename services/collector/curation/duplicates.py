"""Exact and near duplicate prompts: which prompts are curated as one."""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from typing import NamedTuple

from rensa import RMinHash, RMinHashLSH

from services.collector.curation.settings import CurationSettings

_SLOTS, _BANDS, _SEED = 128, 16, 1
"""With sixteen bands of eight slots, two prompts of similarity 0.85 share a band with a probability of 0.994."""


class _Leader(NamedTuple):
    """The first prompt of a group."""

    prompt_id: str
    sketch: RMinHash


class PromptGroups:
    """Groups prompts as they arrive. A prompt's group is the id of the first prompt like it, and never changes.

    Prompts that differ in case, spaces and the sign at their end alone are the same; near duplicates are those whose
    sets of word triples have a Jaccard similarity of `duplicate_similarity` or more, by MinHash. A prompt is held
    against the first of each group only, so a chain of small changes does not become one group.
    """

    def __init__(self, settings: CurationSettings | None = None) -> None:
        self._similarity = (settings or CurationSettings()).duplicate_similarity
        self._group: dict[tuple[str, str], str] = {}
        self._exact: dict[bytes, str] = {}
        self._indexes: dict[str, RMinHashLSH] = {}
        self._leaders: list[_Leader] = []

    def add(self, tenant: str, prompt_id: str, text: str) -> str:
        """The prompt's group, `prompt_id` itself where it is the first of its kind. The same prompt again: the same.

        `text` is the conversation as one text. Tenants never share a group. To build the index anew after a
        restart, add the prompts again in the same order.
        """
        known = self._group.get((tenant, prompt_id))
        if known is None:
            known = self._group[tenant, prompt_id] = self._find(tenant, prompt_id, text)
        return known

    def group(self, tenant: str, prompt_id: str) -> str | None:
        """The group of a prompt that was added; None for any other."""
        return self._group.get((tenant, prompt_id))

    def _find(self, tenant: str, prompt_id: str, text: str) -> str:
        words = _words(text)
        digest = blake2b("\0".join((tenant, *words)).encode(), digest_size=16).digest()
        exact = self._exact.get(digest)
        if exact is not None:
            return exact
        group = self._near(tenant, prompt_id, words)
        self._exact[digest] = group
        return group

    def _near(self, tenant: str, prompt_id: str, words: list[str]) -> str:
        if len(words) < 3:
            return prompt_id  # Too short to be near anything that it does not equal.
        sketch = RMinHash(num_perm=_SLOTS, seed=_SEED)
        sketch.update([" ".join(words[i : i + 3]) for i in range(len(words) - 2)])
        index = self._indexes.get(tenant)
        if index is None:
            index = self._indexes[tenant] = RMinHashLSH(self._similarity, _SLOTS, _BANDS)
        candidates: list[int] = sorted(index.query(sketch))
        for candidate in candidates:
            first = self._leaders[candidate]
            if sketch.jaccard(first.sketch) >= self._similarity:
                return first.prompt_id
        index.insert(len(self._leaders), sketch)
        self._leaders.append(_Leader(prompt_id, sketch))
        return prompt_id


def _words(text: str) -> list[str]:
    """Words and signs in lower case, without those that end the text: 2+2 is not 2*2, but "Hi!" is "hi"."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold().rstrip(" \t\r\n.!?…") or text)
