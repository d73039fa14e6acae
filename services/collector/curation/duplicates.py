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


class _Generation:
    """Prompts that came one after the other."""

    def __init__(self) -> None:
        self.group: dict[tuple[str, str], str] = {}
        self.exact: dict[bytes, str] = {}
        self.indexes: dict[str, RMinHashLSH] = {}
        self.leaders: list[_Leader] = []

    def near(self, tenant: str, sketch: RMinHash, similarity: float) -> _Leader | None:
        """The oldest of the first prompts that are like this one."""
        index = self.indexes.get(tenant)
        candidates: list[int] = [] if index is None else sorted(index.query(sketch))
        found = (self.leaders[candidate] for candidate in candidates)
        return next((leader for leader in found if sketch.jaccard(leader.sketch) >= similarity), None)

    def lead(self, tenant: str, leader: _Leader, similarity: float) -> None:
        """Takes in the first prompt of a group."""
        index = self.indexes.get(tenant)
        if index is None:
            index = self.indexes[tenant] = RMinHashLSH(similarity, _SLOTS, _BANDS)
        index.insert(len(self.leaders), leader.sketch)
        self.leaders.append(leader)


class PromptGroups:
    """Groups prompts as they arrive. A prompt's group is the id of the first prompt like it, and never changes.

    Prompts that differ in case, spaces and the sign at their end alone are the same; near duplicates are those whose
    sets of word triples have a Jaccard similarity of `duplicate_similarity` or more, by MinHash. A prompt is held
    against the first of each group only, so a chain of small changes does not become one group.

    With `most`, it remembers the newest `most` prompts and up to as many before them, and of each group that one of
    these is in, the first: in two generations, of which the older goes when the newer is full.
    """

    def __init__(self, settings: CurationSettings | None = None, *, most: int | None = None) -> None:
        self._similarity = (settings or CurationSettings()).duplicate_similarity
        self._most = most
        self._new, self._old = _Generation(), _Generation()

    def __len__(self) -> int:
        """How many prompts it remembers."""
        return len(self._new.group) + len(self._old.group)

    def add(self, tenant: str, prompt_id: str, text: str) -> str:
        """The prompt's group, `prompt_id` itself where it is the first of its kind. The same prompt again: the same.

        `text` is the conversation as one text. Tenants never share a group. To build the index anew after a
        restart, add the prompts again in the same order.
        """
        known = self.group(tenant, prompt_id)
        if known is None:
            if self._most is not None and len(self._new.group) >= self._most:
                self._new, self._old = _Generation(), self._new
            known = self._new.group[tenant, prompt_id] = self._find(tenant, prompt_id, text)
        return known

    def group(self, tenant: str, prompt_id: str) -> str | None:
        """The group of a prompt that was added, and is remembered; None for any other."""
        return self._new.group.get((tenant, prompt_id)) or self._old.group.get((tenant, prompt_id))

    def _find(self, tenant: str, prompt_id: str, text: str) -> str:
        words = _words(text)
        digest = blake2b("\0".join((tenant, *words)).encode(), digest_size=16).digest()
        group = self._new.exact.get(digest)
        if group is None:
            group = self._new.exact[digest] = self._near(tenant, prompt_id, words, self._old.exact.get(digest))
        return group

    def _near(self, tenant: str, prompt_id: str, words: list[str], same: str | None) -> str:
        """`same` is the group of one in the older generation that is the same."""
        if len(words) < 3:
            return same or prompt_id  # Too short to be near anything that it does not equal.
        sketch = RMinHash(num_perm=_SLOTS, seed=_SEED)
        sketch.update([" ".join(words[i : i + 3]) for i in range(len(words) - 2)])
        leader = self._new.near(tenant, sketch, self._similarity)
        if leader is None:  # what the older one knows of a group that goes on, the newer has to know
            leader = self._old.near(tenant, sketch, self._similarity) or _Leader(same or prompt_id, sketch)
            self._new.lead(tenant, leader, self._similarity)
        return same or leader.prompt_id


def _words(text: str) -> list[str]:
    """Words and signs in lower case, without those that end the text: 2+2 is not 2*2, but "Hi!" is "hi"."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold().rstrip(" \t\r\n.!?…") or text)
