"""Prompts that are the same, or nearly: their feedback is curated together.

The database says which group a prompt belongs to; the index in memory finds the group of a new one. It follows the
database, so that it is the same after a restart, and with other collectors beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, func, insert, select

from services.collector import many
from services.collector.curation import CurationSettings, PromptGroups
from services.collector.tables import generations, prompts
from thumbwheel.v1.events_pb2 import GenerationEvent
from thumbwheel.v1.policy_pb2 import Prompt, Role

MAX_INDEXED = 100_000
"""After a restart, as many prompts, the newest, are looked at for likeness."""


_GROUPS = "SELECT prompt_id, group_id FROM prompts WHERE tenant = :tenant AND prompt_id IN (:many)"
_SINCE = (
    select(prompts.c.number, prompts.c.tenant, prompts.c.prompt_id, prompts.c.group_id)
    .where(prompts.c.number > bindparam("since"))
    .order_by(prompts.c.number)
)


class Groups:
    """Finds the groups of prompts. For one thread: that of the database's writer."""

    def __init__(self, settings: CurationSettings) -> None:
        self._index = PromptGroups(settings)
        self._seen: int | None = None
        # What the index calls a group, where the database knows it by an older prompt that is not indexed.
        self._names: dict[tuple[str, str], str] = {}

    def known(self, connection: Connection, tenant: str, prompt_ids: Sequence[str]) -> dict[str, str]:
        """The groups of these prompts, by prompt id; those that are new are left out."""
        rows = many.find(connection, _GROUPS, prompt_ids, tenant=tenant)
        return {row.prompt_id: row.group_id for row in rows}

    def group_of(self, connection: Connection, event: GenerationEvent) -> str:
        """The group of the prompt that this generation answers; notes it where the prompt is new."""
        tenant, prompt_id = event.tenant, event.generation.prompt_id
        known = self.known(connection, tenant, [prompt_id])
        if known:
            return known[prompt_id]
        self._follow(connection)
        found = self._index.add(tenant, prompt_id, text_of(event.prompt))
        group = self._names.get((tenant, found), found)
        connection.execute(insert(prompts), {"tenant": tenant, "prompt_id": prompt_id, "group_id": group})
        return group

    def _follow(self, connection: Connection) -> None:
        """Indexes the prompts that came into the database since: at first all, later those of other collectors."""
        if self._seen is None:
            newest = connection.execute(select(func.max(prompts.c.number))).scalar_one_or_none() or 0
            self._seen = max(0, newest - MAX_INDEXED)
        rows = connection.execute(_SINCE, {"since": self._seen}).all()
        for number, tenant, prompt_id, group_id in rows:
            any_event = select(generations.c.event).where(
                generations.c.tenant == tenant, generations.c.prompt_id == prompt_id
            )
            data = connection.execute(any_event.limit(1)).scalar_one_or_none()
            if data is not None:  # else it was erased since
                found = self._index.add(tenant, prompt_id, text_of(GenerationEvent.FromString(data).prompt))
                if found != group_id:
                    self._names[tenant, found] = group_id
            self._seen = number


def text_of(prompt: Prompt) -> str:
    """A conversation as one text."""
    match prompt.WhichOneof("content"):
        case "chat":
            return "\n".join(f"{Role.Name(message.role)}: {message.content}" for message in prompt.chat.messages)
        case "text":
            return prompt.text
        case _:
            return " ".join(str(token) for token in prompt.tokens.ids)
