"""A stack on a tiny model with traffic of every kind, and a Prometheus that scrapes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.monitoring.prometheus import MONITORING, Prometheus, prometheus
from tests.support import free_base_port, make_tiny_llama, until
from thumbwheel import errors
from thumbwheel.client import AsyncClient
from thumbwheel.stack import Stack, StackSettings
from thumbwheel.v1.policy_pb2 import GenerateBulkRequest, SamplingParams

SECRET_PROMPT, SECRET_COMMENT = "xyzzy-the-prompt", "xyzzy-the-comment"
"""What users write: to be found nowhere in logs or spans."""

COMPARISONS = 12
"""Of each of two rounds: together enough for what the reward model is watched by."""

ENVIRONMENT = {
    "THUMBWHEEL_LEARN_FROM_CUT": "true",  # every answer is cut here
    "THUMBWHEEL_MAX_MODEL_LEN": "512",
    "THUMBWHEEL_REFERENCE_MAX_TOKENS": "24",
    "THUMBWHEEL_ROUND_SIZE": str(COMPARISONS),
    "THUMBWHEEL_MAX_WAIT_SECONDS": "600",
    "THUMBWHEEL_POLICY_LEARNING_RATE": "1e-3",
    "THUMBWHEEL_REWARD_LEARNING_RATE": "1e-3",
}
SHORT = SamplingParams(max_tokens=24, ignore_eos=True)
_LIVE_SECONDS = 240.0


@dataclass
class Watched:
    """What is running."""

    stack: Stack
    client: AsyncClient
    prometheus: Prometheus
    logs: Path


@contextlib.asynccontextmanager
async def watched(folder: Path, *, trace_endpoint: str = "") -> AsyncIterator[Watched]:
    """The stack, having been all the way round once, and scraped since before that."""
    model = make_tiny_llama(folder / "tiny", seed=0)
    settings = StackSettings(
        home=folder / "home",
        base_port=free_base_port(),
        model=str(model),
        trace_endpoint=trace_endpoint,
        serve_reference=True,
    )
    at = settings.addresses
    async with Stack.running(settings, environment=ENVIRONMENT) as stack:
        targets = {part: f"{settings.host}:{at.metrics_port(part)}" for part in at.parts}
        async with AsyncClient(policy=at.policy, reward=at.reward, collector=at.collector, timeout=60.0) as client:
            with prometheus(folder / "prometheus", targets) as watching:
                await until(lambda: asyncio.to_thread(_all_up, watching, set(targets)), timeout=60)
                await traffic(client)
                await until(_is(client.policy, "policy-000001"), timeout=_LIVE_SECONDS)
                await until(_is(client.reward, "reward-000001"), timeout=_LIVE_SECONDS)
                await traffic(client)
                # What of it is learnt in a second round goes live as well before anything is asserted.
                await until(_is(client.policy, "policy-000002"), timeout=_LIVE_SECONDS)
                await until(_is(client.reward, "reward-000002"), timeout=_LIVE_SECONDS)
                yield Watched(stack, client, watching, settings.logs_path)


def _all_up(watching: Prometheus, jobs: set[str]) -> bool:
    return {job for job, health in watching.targets().items() if health == "up"} == jobs


def _is(get: Callable[[], Awaitable[Any]], version: str) -> Callable[[], Awaitable[bool]]:
    async def live() -> bool:
        return bool((await get()).version == version)

    return live


async def traffic(client: AsyncClient) -> None:
    """Calls of every kind, good and bad; enough comparisons for a round."""
    for index in range(COMPARISONS):
        user_id = f"u{index % 2}"  # one alone would be too fast to be a person
        shown = await client.candidates(f"{SECRET_PROMPT} {index}", sampling=SHORT, user_id=user_id)
        a, b = shown.candidates
        await client.compare(a, b, "a" if index % 4 < 2 else "b", user_id=user_id)
    await client.thumb(a, up=True, user_id="u", key=a.generation_id)
    await client.thumb(a, up=True, user_id="u", key=a.generation_id)
    await client.comment(a, SECRET_COMMENT, user_id="u")
    [piece async for piece in client.stream(SECRET_PROMPT, sampling=SHORT)]
    await client.score(SECRET_PROMPT, "one", "other")

    async def bulk() -> AsyncIterator[GenerateBulkRequest]:
        request = GenerateBulkRequest(request_id="1", sampling=SHORT)
        request.prompt.text = SECRET_PROMPT
        yield request

    [response async for response in client.bulk(bulk(), timeout=60.0)]
    with contextlib.suppress(errors.InvalidArgument):
        await client.generate(SECRET_PROMPT, sampling=SamplingParams(temperature=-1.0))
    with contextlib.suppress(errors.ThumbwheelError):
        await client.edit(a, "", user_id="u")


def queries() -> dict[str, list[str]]:
    """Every query of every dashboard as it is committed, by dashboard, with Grafana's variables filled in."""
    found: dict[str, list[str]] = {}
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        panels = json.loads(path.read_text())["panels"]
        targets = [target for panel in panels for target in panel.get("targets", ())]
        found[path.stem] = [target["expr"].replace("$__rate_interval", "5m") for target in targets]
    return found


async def without_data(watching: Prometheus, *, seconds: float = 30.0) -> list[str]:
    """Those queries of the dashboards that bring no number, though given time for another scrape or two."""
    left = [f"{name}: {expression}" for name, several in queries().items() for expression in several]

    async def all_bring_some() -> bool:
        left[:] = [one for one in left if not await asyncio.to_thread(_brings, watching, one.partition(": ")[2])]
        return not left

    with contextlib.suppress(TimeoutError):
        await until(all_bring_some, timeout=seconds, every=1.0)
    return left


def _brings(watching: Prometheus, expression: str) -> bool:
    return any(series["value"][1] != "NaN" for series in watching.query(expression))


def names_exported(stack: Stack) -> set[str]:
    """The names of all series that the parts serve."""
    at, names = stack.addresses, set()
    for part in at.parts:
        url = f"http://{stack.settings.host}:{at.metrics_port(part)}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        names |= {line.partition(" ")[0].partition("{")[0] for line in lines if line and not line.startswith("#")}
        names |= {line.split()[2] for line in lines if line.startswith("# TYPE")}
    return names
