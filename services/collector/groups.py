"""Prompts that are the same, or nearly: their feedback is curated together.

The database says which group a prompt belongs to; the index in memory finds the group of a new one. It follows the
database, so that it is the same after a restart, and with other collectors beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from sqlalchemy import Connection, bindparam, func, insert, select

from services.collector import many
from services.collector.curation import CurationSettings, PromptGroups
from services.collector.tables import prompts
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import Prompt, Role

MAX_INDEXED = 100_000
"""As many prompts, the newest, are looked at for likeness: some 250 MB."""


_GROUPS = "SELECT prompt_id, group_id FROM prompts WHERE tenant = :tenant AND prompt_id IN (:many)"
# By prompt alone: given the tenant too, SQLite reads everything of that tenant.
_ANSWERS = "SELECT tenant, prompt_id, event FROM generations WHERE prompt_id IN (:many)"
_SINCE = (
    select(prompts.c.number, prompts.c.tenant, prompts.c.prompt_id, prompts.c.group_id)
    .where(prompts.c.number > bindparam("since"))
    .order_by(prompts.c.number)
)


class Groups:
    """Finds the groups of prompts. For one thread: that of the database's writer."""

    def __init__(self, settings: CurationSettings) -> None:
        self._index = PromptGroups(settings, most=MAX_INDEXED // 2)
        self._seen: int | None = None
        # What the index calls a group, where the database knows it by an older prompt that is not indexed.
        self._names: dict[tuple[str, str], str] = {}

    def of(self, connection: Connection, tenant: str, answered: Mapping[str, bytes]) -> dict[str, str]:
        """The groups of prompts, by prompt id; notes those that are new. `answered` has of each the event of a
        generation that answers it.
        """
        if not answered:
            return {}
        rows = many.find(connection, _GROUPS, list(answered), tenant=tenant)
        found: dict[str, str] = {row.prompt_id: row.group_id for row in rows}
        new = [prompt_id for prompt_id in answered if prompt_id not in found]
        if not new:
            return found
        self._follow(connection)
        values = []
        for prompt_id in new:
            text = text_of(GenerationEvent.FromString(answered[prompt_id]).prompt)
            group = self._index.add(tenant, prompt_id, text)
            found[prompt_id] = self._names.get((tenant, group), group)
            values.append({"tenant": tenant, "prompt_id": prompt_id, "group_id": found[prompt_id]})
        connection.execute(insert(prompts), values)
        return found

    def _follow(self, connection: Connection) -> None:
        """Indexes the prompts that came into the database since: at first all, later those of other collectors."""
        if self._seen is None:
            newest = connection.execute(select(func.max(prompts.c.number))).scalar_one_or_none() or 0
            self._seen = max(0, newest - MAX_INDEXED)
        rows = iter(connection.execute(_SINCE, {"since": self._seen}).all())
        while page := list(islice(rows, many.PAGE)):
            # Its own are there, and need not be read again.
            unknown = [row.prompt_id for row in page if self._index.group(row.tenant, row.prompt_id) is None]
            texts = {
                (tenant, prompt_id): text_of(GenerationEvent.FromString(event).prompt)
                for tenant, prompt_id, event in many.find(connection, _ANSWERS, unknown)
            }
            for row in page:
                known = self._index.group(row.tenant, row.prompt_id)
                text = texts.get((row.tenant, row.prompt_id))
                if known is None and text is not None:  # else it was erased since
                    known = self._index.add(row.tenant, row.prompt_id, text)
                if known is not None and known != row.group_id:
                    self._names[row.tenant, known] = row.group_id
                self._seen = row.number
        if len(self._names) > MAX_INDEXED:
            there = {key: name for key, name in self._names.items() if self._index.group(*key) is not None}
            self._names = there


def text_of(prompt: Prompt) -> str:
    """A conversation as one text."""
    match prompt.WhichOneof("content"):
        case "chat":
            return "\n".join(f"{Role.Name(message.role)}: {message.content}" for message in prompt.chat.messages)
        case "text":
            return prompt.text
        case _:
            return " ".join(str(token) for token in prompt.tokens.ids)
