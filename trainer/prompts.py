"""Prompts that the policy is to answer for training: those that people's feedback is about, as long as it stands.

A prompt waits, is asked, and comes back as a group of rollouts. What is asked and not back yet counts as waiting in a
training checkpoint, so that a crash in between loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thumbwheel import errors
from trainer.samples import Tokens

PROMPTS = "prompts.jsonl"

MOST = 4096
"""Prompts that are kept; of more, those asked most often go first, and of these the oldest."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered."""

    id: str
    """Id of the feedback that brought it, and which use of the prompt it is, such as `…/2`; that of the group, too."""

    tokens: Tokens
    """Its token ids."""

    reference: str = ""
    """A response of the reference model to it; none where no baseline is wanted."""


@dataclass
class _Entry:
    tokens: Tokens
    sources: list[str]
    """Ids of the feedback that it stands by, oldest first."""
    uses: int = 0
    """How often it came back."""
    reference: str = ""


@dataclass
class Prompts:
    """Distinct prompts, each to be used `uses` times."""

    uses: int
    _entries: dict[Tokens, _Entry] = field(default_factory=dict)
    _by_source: dict[str, Tokens] = field(default_factory=dict)
    _asked: dict[str, Tokens] = field(default_factory=dict)
    """By the id that they were asked under."""

    def __len__(self) -> int:
        """Prompts that could be asked now."""
        return len(self._free())

    def add(self, source: str, tokens: Tokens) -> bool:
        """Takes in the prompt of a piece of feedback. False for one that is here already."""
        if source in self._by_source:
            return False
        self._by_source[source] = tokens
        entry = self._entries.get(tokens)
        if entry is not None:
            entry.sources.append(source)
            return False
        self._entries[tokens] = _Entry(tokens, [source])
        if len(self._entries) > MOST:
            self._drop(max(self._entries.values(), key=lambda entry: entry.uses))
        return True

    def retract(self, source: str) -> None:
        """Forgets what a piece of feedback brought, unless another piece of feedback stands for it."""
        tokens = self._by_source.pop(source, None)
        if tokens is None:
            return
        entry = self._entries[tokens]
        entry.sources.remove(source)
        if not entry.sources:
            self._drop(entry)

    def take(self, count: int) -> list[Prompt]:
        """Up to `count` prompts to be asked now: those used least often first, and of these the oldest."""
        entries = sorted(self._free(), key=lambda entry: entry.uses)[:count]
        taken = [Prompt(f"{entry.sources[0]}/{entry.uses + 1}", entry.tokens, entry.reference) for entry in entries]
        self._asked.update((prompt.id, prompt.tokens) for prompt in taken)
        return taken

    def came_back(self, prompt: Prompt) -> bool:
        """Counts the use of a prompt. False where it was retracted meanwhile: what came of it is not to be learnt."""
        tokens = self._asked.pop(prompt.id)
        entry = self._entries.get(tokens)
        if entry is None:
            return False
        entry.uses += 1
        return True

    def refer(self, references: Mapping[Tokens, str]) -> None:
        """Keeps responses of the reference model, by the prompt that they answer."""
        for tokens, text in references.items():
            if tokens in self._entries:
                self._entries[tokens].reference = text

    def save(self, folder: Path) -> None:
        """Writes everything into `folder`."""
        with (folder / PROMPTS).open("w") as file:
            for entry in self._entries.values():
                fields = {"prompt": entry.tokens, "sources": entry.sources, "uses": entry.uses}
                file.write(json.dumps(fields | {"reference": entry.reference}, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, folder: Path, uses: int) -> Prompts:
        """Reads what `save` wrote; nothing where an older checkpoint has none. Raises `errors.CorruptCheckpoint`."""
        prompts = cls(uses)
        path = folder / PROMPTS
        if not path.exists():
            return prompts
        try:
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                entry = _Entry(tuple(fields["prompt"]), list(fields["sources"]), fields["uses"], fields["reference"])
                prompts._entries[entry.tokens] = entry
                prompts._by_source.update(dict.fromkeys(entry.sources, entry.tokens))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise errors.CorruptCheckpoint(
                f"{path} cannot be read: {error}.", remedy="Was it written by another release?"
            ) from error
        return prompts

    def _free(self) -> list[_Entry]:
        asked = set(self._asked.values())
        return [entry for entry in self._entries.values() if entry.uses < self.uses and entry.tokens not in asked]

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.tokens]
        for source in entry.sources:
            self._by_source.pop(source, None)
