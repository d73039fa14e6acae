"""The demo: a whole deployment, users with one preference, and the proof that the model came to share it.

    start everything → measure version 0 → repeat: compare · learn · go live · measure → account for every click

Nothing here knows how a version is made: it asks, judges and waits, over the same gRPC as any application.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from thumbwheel import errors
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.client import AsyncClient, to_prompt
from thumbwheel.demo import memory, report
from thumbwheel.demo.config import DemoSettings
from thumbwheel.demo.preferences import PREFERENCES, Preference, fluent
from thumbwheel.demo.prompts import held_out_prompts, train_prompts
from thumbwheel.demo.users import Users
from thumbwheel.stack import Stack
from thumbwheel.v1 import preference_pb2
from thumbwheel.v1.policy_pb2 import SamplingParams, SwapOutcome
from thumbwheel.v1.reward_pb2 import ScoreItem
from thumbwheel.v1.rollout_pb2 import CheckpointManifest, ModelRole

FLUENT_SHARE = 0.9
"""Least share of fluent answers of the last version: below it, the model has collapsed."""

_POLL_SECONDS = 0.5
_SCORES_A_CALL = 32


@dataclass
class Measured:
    """Answers of one policy version to the held-out prompts."""

    version: str
    prompts: list[str]
    answers: list[str]
    rewards: list[float] = field(default_factory=list)


class Demo:
    """One run. `settings` have been checked; `console` is where people look."""

    def __init__(self, settings: DemoSettings, client: AsyncClient, console: Console) -> None:
        self._settings, self._client, self._console = settings, client, console
        self._preference: Preference = PREFERENCES[settings.preference]
        self._sampling = SamplingParams(temperature=1.0, max_tokens=settings.max_tokens)
        self._users = Users(client, self._preference, train_prompts(), self._sampling, settings.seed)
        self._measured: list[Measured] = []
        self._store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))

    async def turn(self) -> None:
        """Turns the wheel until `versions` new policy versions have gone live, measuring each."""
        await self._measure((await self._client.policy()).version)
        async with asyncio.TaskGroup() as group:
            chatter = group.create_task(self._users.chat())
            for turn in range(1, self._settings.versions + 1):
                await self._collect(turn)
                version = await self._live(turn)
                await self._measure(version)
            await self._settle()
            chatter.cancel()
        await self._score()

    async def _collect(self, turn: int) -> None:
        count = self._settings.comparisons_per_version
        told: asyncio.Queue[str] = asyncio.Queue()
        with self._bar(f"turn {turn}: people compare", count) as advance:
            comparing = asyncio.create_task(self._users.compare(count, self._settings.concurrency, told))
            for _ in range(count):
                waiting = asyncio.create_task(told.get())
                await asyncio.wait({waiting, comparing}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done() and told.empty():
                    waiting.cancel()
                    await comparing
                    raise errors.Internal(f"Users gave up after {len(self._users.ledger.failures)} failed requests.")
                await waiting
                advance()
            await comparing

    async def _live(self, sequence: int) -> str:
        """Waits until the policy version of this number, or a later one, is live."""
        with self._bar(f"turn {sequence}: the trainer learns and publishes", None):
            while True:
                now = await self._client.policy()
                if int(now.version.rpartition("-")[2]) >= sequence:
                    return now.version
                await asyncio.sleep(_POLL_SECONDS)

    async def _settle(self) -> None:
        """Waits until the reward model, too, has learnt from everything, and is live."""
        with self._bar("the reward model catches up", None):
            while True:
                learnt = await asyncio.to_thread(self._learnt, ModelRole.MODEL_ROLE_REWARD)
                newest = await asyncio.to_thread(self._store.latest, ModelRole.MODEL_ROLE_REWARD)
                live = (await self._client.reward()).version
                expected = self._settings.versions * self._settings.comparisons_per_version
                if sum(len(ids) for ids in learnt.values()) >= expected and newest and newest.version == live:
                    return
                await asyncio.sleep(4 * _POLL_SECONDS)

    async def _measure(self, version: str) -> None:
        """Asks the held-out questions. Answers that a later version had a part in do not count for this one."""
        prompts = held_out_prompts(self._settings.questions)
        measured = Measured(version, [], [])
        gate = asyncio.Semaphore(self._settings.concurrency)
        with self._bar(f"asking {version} what it was not trained on", len(prompts)) as advance:

            async def ask(index: int, prompt: str) -> None:
                # The same seed for every version, so that versions differ by their weights alone.
                sampling = SamplingParams(seed=1000 * self._settings.seed + index)
                sampling.MergeFrom(self._sampling)
                async with gate:
                    self._users.ledger.requests += 1
                    try:
                        answer = await self._client.generate(prompt, sampling=sampling, user_id="observer")
                    except errors.ThumbwheelError as error:
                        self._users.ledger.failed(error)
                        return
                advance()
                if all(span.version == version for span in answer.spans):
                    measured.prompts.append(prompt)
                    measured.answers.append(answer.text)

            async with asyncio.TaskGroup() as group:
                for index, prompt in enumerate(prompts):
                    group.create_task(ask(index, prompt))
        self._measured.append(measured)
        self._console.print(f"  {version}: {self._rate(measured):.0%} {self._preference.name}")

    async def _score(self) -> None:
        """Scores all answers with the last reward version, so that versions are measured with one measure."""
        for measured in self._measured:
            for start in range(0, len(measured.answers), _SCORES_A_CALL):
                part = slice(start, start + _SCORES_A_CALL)
                items = [
                    ScoreItem(prompt=to_prompt(prompt), response=answer or " ")
                    for prompt, answer in zip(measured.prompts[part], measured.answers[part], strict=True)
                ]
                self._users.ledger.requests += 1
                scored = await self._client.score_items(items)
                measured.rewards.extend(score.score for score in scored.scores)

    def _rate(self, measured: Measured) -> float:
        shown = [self._preference.shows(p, a) for p, a in zip(measured.prompts, measured.answers, strict=True)]
        return sum(shown) / max(1, len(shown))

    def _learnt(self, role: ModelRole.ValueType) -> dict[str, list[str]]:
        """Version → the ids of the comparisons it learnt from, as its signed lineage lists them."""
        manifests: list[CheckpointManifest] = self._store.versions(role)
        return {
            manifest.version: (self._store.root / manifest.version / "samples.txt").read_text().split()
            for manifest in manifests
            if manifest.sequence > 0
        }

    async def account(self) -> dict[str, Any]:
        """The books: what was acknowledged, what was learnt, how long that took. Keys are those of the JSON line."""
        ledger = self._users.ledger
        records = await self._client.feedback([*ledger.comparisons, *ledger.ties, *ledger.thumbs])
        known = {record.feedback_id: record for record in records}
        learnt = {
            sample: version for version, ids in self._learnt(ModelRole.MODEL_ROLE_POLICY).items() for sample in ids
        }
        policy, reward = await self._client.policy(), await self._client.reward()
        live_at = {
            s.version: s.at.ToNanoseconds() / 1e9 for s in policy.swaps if s.outcome == SwapOutcome.SWAP_OUTCOME_LIVE
        }
        trained, waits, lost = 0, [], 0
        for feedback_id, acked_at in ledger.comparisons.items():
            record = known.get(feedback_id)
            version = learnt.get(record.comparison_id) if record is not None else None
            if version is None:
                lost += 1
                continue
            trained += 1
            if version in live_at:
                waits.append(live_at[version] - acked_at)
        apart = preference_pb2.FEEDBACK_STATE_APART, preference_pb2.FEEDBACK_STATE_RECORDED
        lost += sum(1 for one in (*ledger.ties, *ledger.thumbs) if one not in known or known[one].state not in apart)
        swaps = [s for s in (*policy.swaps[1:], *reward.swaps[1:]) if s.outcome == SwapOutcome.SWAP_OUTCOME_LIVE]
        return {
            "preference": self._preference.name,
            "seed": self._settings.seed,
            "requests": ledger.requests,
            "requests_failed": len(ledger.failures),
            "feedback_acked": ledger.acked,
            "feedback_trained": trained,
            "feedback_apart": len(ledger.ties) + len(ledger.thumbs),
            "feedback_lost": lost,
            "versions_published": len(self._learnt(ModelRole.MODEL_ROLE_POLICY)),
            "reward_versions_published": len(self._learnt(ModelRole.MODEL_ROLE_REWARD)),
            "swaps": len(swaps),
            "swap_pause_seconds_max": round(max((s.pause_seconds for s in swaps), default=0.0), 3),
            "preference_rate_before": round(self._rate(self._measured[0]), 4),
            "preference_rate_after": round(self._rate(self._measured[-1]), 4),
            "fluent_share_before": round(_share_fluent(self._measured[0]), 4),
            "fluent_share_after": round(_share_fluent(self._measured[-1]), 4),
            "feedback_to_live_seconds_p50": round(report.percentile(waits, 50), 2),
            "feedback_to_live_seconds_p95": round(report.percentile(waits, 95), 2),
        }

    def rows(self) -> list[report.Row]:
        """What was measured, a row a version."""
        return [
            report.Row.measure(
                version=m.version,
                shows=[self._preference.shows(p, a) for p, a in zip(m.prompts, m.answers, strict=True)],
                fluent=[fluent(a) for a in m.answers],
                answers=m.answers,
                rewards=m.rewards,
            )
            for m in self._measured
        ]

    @property
    def failures(self) -> list[str]:
        """Why requests failed, if any did."""
        return self._users.ledger.failures

    @contextlib.contextmanager
    def _bar(self, text: str, total: int | None) -> Any:
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn()]
        if total is not None:
            columns.insert(3, MofNCompleteColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)


def _share_fluent(measured: Measured) -> float:
    return sum(fluent(answer) for answer in measured.answers) / max(1, len(measured.answers))


def _faults(figures: dict[str, Any]) -> list[str]:
    """What the demo promised and did not keep."""
    faults = []
    if figures["requests_failed"]:
        faults.append(f"{figures['requests_failed']} requests failed")
    if figures["feedback_lost"]:
        faults.append(f"{figures['feedback_lost']} acknowledged pieces of feedback were lost")
    if figures["versions_published"] < figures["versions_wanted"]:
        faults.append(f"only {figures['versions_published']} versions were published")
    if figures["fluent_share_after"] < FLUENT_SHARE:
        faults.append(
            f"only {figures['fluent_share_after']:.0%} of the last version's answers are fluent: it collapsed"
        )
    return faults


@contextlib.asynccontextmanager
async def _deployment(settings: DemoSettings, console: Console) -> AsyncIterator[Stack]:
    """A fresh deployment, set for quick turns; its state is removed afterwards, its logs are kept."""
    if settings.home.exists():
        shutil.rmtree(settings.home)
    environment = {
        "THUMBWHEEL_ROUND_SIZE": str(settings.comparisons_per_version),
        # Every round is a full one: the users give exactly as many verdicts as it takes.
        "THUMBWHEEL_MAX_WAIT_SECONDS": "600",
        "THUMBWHEEL_POLICY_LEARNING_RATE": str(settings.learning_rate),
        "THUMBWHEEL_REWARD_LEARNING_RATE": str(settings.learning_rate),
        # At such a rate DPO alone overshoots: answers that were to become short became fragments.
        "THUMBWHEEL_NLL_WEIGHT": "1.0",
        # Answers are short here, so that turns are quick: most end because they may be no longer.
        "THUMBWHEEL_LEARN_FROM_CUT": "true",
        "THUMBWHEEL_MAX_MODEL_LEN": "1024",
        "THUMBWHEEL_SEED": str(settings.seed),
    }
    console.print(f"starting everything; logs are in {settings.logs_path}")
    try:
        with console.status("starting") as spinner:
            say: Callable[[str], None] = spinner.update
            async with Stack.running(settings, environment=environment, progress=say) as stack:
                spinner.stop()
                yield stack
    finally:
        if not settings.keep:
            for folder in ("store", "trainer"):
                shutil.rmtree(settings.home / folder, ignore_errors=True)


async def run(settings: DemoSettings) -> None:
    """Runs the demo; the last line on standard output is one JSON object. Ends with status 1 where a promise broke."""
    if settings.list:
        for preference in PREFERENCES.values():
            print(f"{preference.name:12} {preference.description}")
        return
    if settings.preference not in PREFERENCES:
        raise errors.InvalidArgument(
            f"is {settings.preference!r}.", field="--preference", remedy=f"Use one of {', '.join(PREFERENCES)}."
        )
    random.seed(settings.seed)
    started, console = time.monotonic(), Console(stderr=True)
    preference = PREFERENCES[settings.preference]
    console.print(f"[bold]Thumbwheel demo[/]: users who prefer answers that are [bold]{preference.name}[/]")
    console.print(f"  ({preference.description})")
    settings.out.mkdir(parents=True, exist_ok=True)
    try:
        async with asyncio.timeout(settings.deadline_minutes * 60), _deployment(settings, console) as stack:
            at = stack.addresses
            async with AsyncClient(policy=at.policy, reward=at.reward, collector=at.collector) as client:
                demo = Demo(settings, client, console)
                async with memory.peak() as peak:
                    await demo.turn()
                    figures = await demo.account()
    except TimeoutError as error:
        raise errors.DeadlineExceeded(
            f"The demo did not end within {settings.deadline_minutes:g} minutes.",
            remedy=f"See {settings.logs_path}, or allow more --deadline-minutes.",
        ) from error
    figures |= {
        "versions_wanted": settings.versions,
        "peak_memory_bytes": peak.bytes,
        "seconds": round(time.monotonic() - started, 1),
    }
    plot = settings.out / f"{settings.preference}-seed{settings.seed}.png"
    rows = demo.rows()
    report.print_table(rows, console, preference=preference.name)
    report.save_plot(rows, plot, preference=preference.name)
    console.print(f"plot saved to {plot}")
    for failure in demo.failures[:5]:
        console.print(f"[red]failed[/]: {failure}")
    faults = _faults(figures)
    for fault in faults:
        console.print(f"[bold red]{fault}[/]")
    line = json.dumps(figures)
    await asyncio.to_thread(plot.with_suffix(".json").write_text, line + "\n")
    print(line, flush=True)
    if faults:
        sys.exit(1)
