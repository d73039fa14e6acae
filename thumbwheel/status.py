"""What a running stack is doing, read over gRPC and from its metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.config import split_address
from thumbwheel.stack import Addresses

_JOINED_STATES = ("ACCEPTED", "APART", "RECORDED", "SUPERSEDED", "QUARANTINED")


@dataclass(frozen=True)
class Samples:
    """The metrics of a process at a moment: (name, labels, value)."""

    values: tuple[tuple[str, dict[str, str], float], ...] = ()

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over all series that carry these labels."""
        return sum(value for found, of, value in self.values if found == name and labels.items() <= of.items())


@dataclass
class Status:
    """A moment of a running stack. A part that does not answer is named in `away`, with the reason."""

    policy_version: str = ""
    reward_version: str = ""
    requests_in_flight: int = 0
    swaps: int = 0
    tokens: int = 0
    feedback: int = 0
    held: int = 0
    outbox: int = 0
    learnt: int = 0
    pending: int = 0
    away: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The moment in one line."""
        parts = [
            f"policy {self.policy_version or '–'}",
            f"reward {self.reward_version or '–'}",
            f"{self.requests_in_flight} in flight",
            f"{self.tokens:,} tokens",
            f"{self.feedback:,} feedback",
            f"{self.pending:,} waiting",
            f"{self.learnt:,} learnt",
            f"{self.swaps} swaps",
        ]
        if self.away:
            parts.append("away: " + ", ".join(sorted(self.away)))
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The moment for machines."""
        return asdict(self)


def scrape(address: str, timeout: float = 2.0) -> Samples:
    """Metrics of the process at "host:port". Raises `errors.Unavailable`."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout) as response:
            text = response.read().decode()
    except OSError as error:
        raise errors.Unavailable(f"No metrics from {address}: {error}.") from error
    families = text_string_to_metric_families(text)
    return Samples(tuple((one.name, dict(one.labels), one.value) for family in families for one in family.samples))


async def read_status(client: AsyncClient, addresses: Addresses) -> Status:
    """Asks every part at once."""
    host, _ = split_address(addresses.policy)

    async def metrics(part: str) -> Samples:
        return await asyncio.to_thread(scrape, f"{host}:{addresses.metrics_port(part)}")

    status = Status()
    answers: dict[str, Any] = {}

    async def ask(part: str, question: Awaitable[Any]) -> None:
        try:
            answers[part] = await question
        except errors.ThumbwheelError as error:
            status.away[part.removesuffix(" metrics")] = str(error)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("policy", client.policy()))
        group.create_task(ask("reward", client.reward()))
        for part in addresses.parts:
            group.create_task(ask(f"{part} metrics", metrics(part)))
    if policy := answers.get("policy"):
        status.policy_version, status.requests_in_flight = policy.version, policy.requests_in_flight
        status.swaps = max(0, len(policy.swaps) - 1)
    if reward := answers.get("reward"):
        status.reward_version = reward.version

    def by_part(part: str) -> Samples:
        samples: Samples = answers.get(f"{part} metrics", Samples())
        return samples

    status.tokens = int(by_part("policy").total("thumbwheel_policy_tokens_total"))
    collector, trainer = by_part("collector"), by_part("trainer")
    # What is held is counted when it is held and again when it is joined.
    status.feedback = sum(
        int(collector.total("thumbwheel_collector_feedback_total", state=state)) for state in _JOINED_STATES
    ) + int(collector.total("thumbwheel_collector_held"))
    status.held = int(collector.total("thumbwheel_collector_held"))
    status.outbox = int(collector.total("thumbwheel_collector_outbox_depth"))
    status.learnt = int(trainer.total("thumbwheel_trainer_samples_learnt_total"))
    status.pending = int(trainer.total("thumbwheel_trainer_pending_samples"))
    return status
