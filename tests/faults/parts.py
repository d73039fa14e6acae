"""The whole wheel, whose parts are killed one after the other while it turns, watched by a real Prometheus.

    python -m tests.faults.parts --kills 1 --seed 1

Users ask, and vote on what they are shown; policy, reward, collector and trainer are killed (-9) in an order that the
seed decides, and started again; between any two that talk to each other there is a proxy that fails the ways that
networks do (the collector's links to its database and its clients are in `alerted`). At the end three versions are
announced whose weights were damaged on the disk. What users were told decides: each comparison that was acknowledged
and accepted is in the samples of one version of the policy, and of one alone; no response is of a version that does not
verify.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.alerted import MOST_EVALUATIONS, MOST_RECOVERY_SECONDS, MOST_RETRIES
from tests.faults.proxy import FAULTS, Proxy
from tests.monitoring.prometheus import Prometheus, prometheus
from tests.support import Deployment, Process, announce, free_port, make_tiny_llama, until
from thumbwheel import errors
from thumbwheel.checkpoints.store import SAMPLES
from thumbwheel.client import AsyncClient
from thumbwheel.stream import open_log
from thumbwheel.stream.broker import EmbeddedBroker
from thumbwheel.v1.policy_pb2 import SamplingParams
from thumbwheel.v1.preference_pb2 import FeedbackState
from thumbwheel.v1.rollout_pb2 import ModelRole

POLICY = ModelRole.MODEL_ROLE_POLICY
PARTS = ("policy", "reward", "collector", "trainer")
USERS = 3
SHORT = SamplingParams(max_tokens=16, ignore_eos=True)
LINKS = ("application", "broker", "policy", "reward")
"""What lies behind a proxy: the policy, for applications; the broker, for all; policy and reward, for other parts."""
ENVIRONMENT = {
    "THUMBWHEEL_PAIRS_FROM": "both",  # so that the trainer asks policy and reward
    "THUMBWHEEL_ROLLOUT_RESPONSES": "2",
    "THUMBWHEEL_ROLLOUT_TOKENS": "8",
    "THUMBWHEEL_LEARN_FROM_CUT": "true",  # every answer is cut here
    "THUMBWHEEL_MAX_MODEL_LEN": "256",
    "THUMBWHEEL_ROUND_SIZE": "16",
    "THUMBWHEEL_MIN_ROUND_SIZE": "1",
    "THUMBWHEEL_MAX_WAIT_SECONDS": "5",
}
_WAIT_SECONDS = 120.0
_LINK_SECONDS = 3.0
_LATE_SECONDS = 12.0
_ALERTS = {
    "broker": "ThumbwheelBrokerAway",
    # A silent network takes the trainer a minute to notice, and it only waits.
    "policy: reset": "ThumbwheelRolloutsWait",
    "reward: reset": "ThumbwheelRolloutsWait",
}


@dataclass
class Told:
    """What users were told: ids of acknowledged comparisons, versions of responses, when each part answered last."""

    comparisons: list[str] = field(default_factory=list)
    generations: int = 0
    versions: set[str] = field(default_factory=set)
    answered: dict[str, float] = field(default_factory=dict)
    done_again: int = 0
    refusals: int = 0


@dataclass
class Report:
    """What came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    evaluations: dict[str, int] = field(default_factory=dict)
    recovery: dict[str, float] = field(default_factory=dict)
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    learnt_twice: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    retries: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether every promise was kept."""
        in_time = max(self.recovery.values()) <= MOST_RECOVERY_SECONDS
        told = max(self.evaluations.values()) <= MOST_EVALUATIONS
        nothing = not (self.lost or self.learnt_twice or self.unverified)
        return nothing and in_time and told and self.retries <= MOST_RETRIES

    def to_json(self) -> dict[str, Any]:
        """The closing line."""
        return {
            "faults": "parts",
            "injected": self.faults.total(),
            "acknowledged": self.acknowledged,
            "lost": len(self.lost),
            "doubled": len(self.learnt_twice),
            "unverified": len(self.unverified),
            "most_evaluations": max(self.evaluations.values()),
            "most_recovery_seconds": round(max(self.recovery.values()), 2),
            "retries": round(self.retries, 4),
        }


class Wheel:
    """All parts as processes that can be killed, with a proxy between applications and the policy."""

    def __init__(self, home: Path) -> None:
        self.deployment = Deployment(home)
        port = free_port()
        self.links = {"broker": Proxy(port)}
        self.broker = EmbeddedBroker(port=port, log=home / "broker.log", advertised=self.links["broker"].address)
        common = ["--home", str(home), "--bootstrap-servers", self.broker.bootstrap_servers]
        self.parts = {
            name: Process(
                "trainer" if name == "trainer" else f"services.{name}", list(common), home / f"{name}.log", ENVIRONMENT
            )
            for name in PARTS
        }
        for link, part in {"application": "policy", "policy": "policy", "reward": "reward"}.items():
            self.links[link] = Proxy(self.parts[part].port)
        self.parts["collector"].arguments += ["--reward", self.links["reward"].address]
        for part in ("policy", "reward"):
            self.parts["trainer"].arguments += [f"--{part}", self.links[part].address]
        self.told = Told()

    @property
    def targets(self) -> dict[str, str]:
        """Where Prometheus finds them."""
        return {name: f"127.0.0.1:{part.metrics_port}" for name, part in self.parts.items()}

    def client(self) -> AsyncClient:
        """An application."""
        reward, collector = self.parts["reward"].address, self.parts["collector"].address
        policy = self.links["application"].address
        return AsyncClient(policy=policy, reward=reward, collector=collector, timeout=20.0)


@contextlib.asynccontextmanager
async def turning(home: Path) -> AsyncIterator[Wheel]:
    """The wheel, with users, until the end of the body."""
    from trainer import publish, runtime

    runtime.quiet_transformers()
    wheel = Wheel(home)
    from thumbwheel.auth import ManifestSigner

    publish.ensure_base(
        make_tiny_llama(home / "tiny", seed=0), wheel.deployment.store, ManifestSigner.load(home / "keys")
    )
    with contextlib.ExitStack() as stack:
        for link in wheel.links.values():
            stack.enter_context(link)
        stack.enter_context(wheel.broker)
        try:
            for part in wheel.parts.values():
                part.start()
            for part in wheel.parts.values():
                await asyncio.to_thread(part.wait_serving)
            async with wheel.client() as client:
                users = [asyncio.create_task(_user(client, wheel.told, number)) for number in range(USERS)]
                try:
                    yield wheel
                finally:
                    for one in users:
                        one.cancel()
                    await asyncio.wait(users)
        finally:
            for part in wheel.parts.values():
                with contextlib.suppress(AttributeError):  # one that was never started
                    part.kill()


async def _user(client: AsyncClient, told: Told, number: int) -> None:
    """Asks, votes and scores for ever; what fails is asked again by the client, and then by the user."""
    for turn in range(sys.maxsize):
        try:
            shown = (await client.candidates(f"Question {turn} of {number}", sampling=SHORT)).candidates
            told.answered["policy"] = time.monotonic()
            told.generations += len(shown)
            told.versions |= {span.version for one in shown for span in one.spans}
            await _vote(client, told, shown, f"{number}-{turn}")
            await client.score("Which?", shown[0].text)
            told.answered["reward"] = time.monotonic()
        except errors.ThumbwheelError:
            told.refusals += 1
        await asyncio.sleep(0.3)


async def _vote(client: AsyncClient, told: Told, shown: Any, who: str) -> None:
    while True:
        try:
            acked = await client.compare(shown[0], shown[1], "a", user_id=f"user-{who}", key=f"vote-{who}")
        except (errors.Unavailable, errors.DeadlineExceeded):
            continue
        told.comparisons.append(acked.feedback_id)
        told.done_again += acked.duplicate
        told.answered["collector"] = time.monotonic()
        return


async def run(kills: int, seed: int, say: Callable[[str], None]) -> Report:
    """Each part killed so many times, each fault of each link once, and three damaged versions."""
    draw, report = random.Random(seed), Report()
    with tempfile.TemporaryDirectory(prefix="thumbwheel-parts-") as name:
        home = Path(name)
        async with turning(home) as wheel:
            with prometheus(home / "prometheus", wheel.targets) as watching:
                await until(_answered(wheel.told, 0.0, "policy", "reward", "collector"), timeout=_WAIT_SECONDS)
                todo = [*PARTS] * kills + [f"{link}: {fault}" for link in LINKS for fault in FAULTS]
                draw.shuffle(todo)
                for what in todo:
                    await (_network if ":" in what else _kill)(wheel, watching, what, report)
                    report.faults[what] += 1
                    say(f"  {what}: {_last(report, what)}")
                await _damaged(wheel, watching, report)
                report.faults["damaged versions"] += 1
                say(f"  damaged versions: {_last(report, 'damaged versions')}")
                async with wheel.client() as client:
                    await _judge(wheel, client, report)
    return report


def _answered(told: Told, since: float, *parts: str) -> Callable[[], Any]:
    async def all_of_them() -> bool:
        return all(told.answered.get(part, -1.0) > since for part in parts)

    return all_of_them


def _last(report: Report, what: str) -> str:
    told = f"told of at evaluation {report.evaluations[what]}, " if what in report.evaluations else ""
    return f"{told}as before {report.recovery.get(what, 0.0):.1f} s after it healed"


async def _kill(wheel: Wheel, watching: Prometheus, what: str, report: Report) -> None:
    part = wheel.parts[what]
    part.kill()
    await _told_of(watching, what, "ThumbwheelPartDown", report)
    part.start()
    await asyncio.to_thread(part.wait_serving)
    await _recover(wheel, what, ("policy", "reward", "collector"), report)


async def _network(wheel: Wheel, watching: Prometheus, what: str, report: Report) -> None:
    link, fault = what.split(": ")
    alert = _ALERTS.get(what, _ALERTS.get(link))
    await until(lambda: _is_quiet(watching, alert), timeout=_WAIT_SECONDS)
    # What is late for the broker is later than any part waits for it; a call would only take its time.
    with wheel.links[link].failing(fault, _LATE_SECONDS if link == "broker" else 1.0):  # type: ignore[arg-type]
        if alert:
            await _told_of(watching, what, alert, report)
        await asyncio.sleep(_LINK_SECONDS)
    healed = time.monotonic()
    if link == "application":  # which only those can see
        await _recover(wheel, what, ("policy",), report)
        return
    if link == "broker":
        # A vote counts when what it is about has come from the policy.
        before = len(wheel.told.comparisons)
        async with wheel.client() as client:
            await until(lambda: _is_joined(client, wheel.told.comparisons[before:]), timeout=_WAIT_SECONDS, every=0.1)
        reached = "min(thumbwheel_stream_up)"
        await until(lambda: _is(watching, reached, 1.0), timeout=_WAIT_SECONDS, every=0.05)
    else:
        away = f'max(thumbwheel_trainer_service_away{{service="{link}"}})'
        await until(lambda: _is(watching, away, 0.0), timeout=_WAIT_SECONDS, every=0.05)
    report.recovery[what] = time.monotonic() - healed


async def _is(watching: Prometheus, expression: str, value: float) -> bool:
    return await asyncio.to_thread(watching.value, expression) == value


async def _is_quiet(watching: Prometheus, alert: str | None) -> bool:
    return alert not in {one.name for one in await asyncio.to_thread(watching.alerts)}


async def _is_joined(client: AsyncClient, feedback_ids: list[str]) -> bool:
    records = await client.feedback(feedback_ids)
    return any(record.state == FeedbackState.FEEDBACK_STATE_ACCEPTED for record in records)


async def _recover(wheel: Wheel, what: str, parts: tuple[str, ...], report: Report) -> None:
    healed = time.monotonic()
    await until(_answered(wheel.told, healed, *parts), timeout=_WAIT_SECONDS, every=0.02)
    report.recovery[what] = max(report.recovery.get(what, 0.0), time.monotonic() - healed)


async def _told_of(watching: Prometheus, what: str, alert: str, report: Report) -> None:
    async def fires() -> bool:
        found, now = await asyncio.to_thread(watching.alerts), time.time()
        for one in found:
            if one.name == alert and one.state == "firing":
                at = watching.evaluations(one, now)
                report.evaluations[what] = max(report.evaluations.get(what, 0), at)
                return True
        return False

    await until(fires, timeout=_WAIT_SECONDS)


async def _damaged(wheel: Wheel, watching: Prometheus, report: Report) -> None:
    """Three versions whose weights have a bit flipped; the trainer is ended first, whose numbers they take."""
    assert await asyncio.to_thread(wheel.parts["trainer"].stop, _WAIT_SECONDS) == 0
    store = wheel.deployment.store
    log = open_log(wheel.broker.bootstrap_servers)
    producer = log.producer()
    seed = wheel.deployment.home / "tiny"
    for sequence in (901, 902, 903):
        manifest = await asyncio.to_thread(wheel.deployment.publish_copy, POLICY, sequence, seed)
        weights = store.root / manifest.version / "model.safetensors"
        weights.chmod(0o644)
        data = bytearray(weights.read_bytes())
        data[-100] ^= 1
        weights.write_bytes(data)
        digest = (store.root / manifest.version / "manifest.json").read_bytes()
        await asyncio.to_thread(announce, producer, manifest, hashlib.sha256(digest).hexdigest())
    await _told_of(watching, "damaged versions", "ThumbwheelVersionsRefusedAgain", report)
    await _recover(wheel, "damaged versions", ("policy",), report)
    producer.close(5.0)
    log.close()
    for sequence in (901, 902, 903):
        shutil.rmtree(store.root / f"policy-{sequence:06d}")
    await asyncio.to_thread(wheel.parts["trainer"].start().wait_serving)


async def _judge(wheel: Wheel, client: AsyncClient, report: Report) -> None:
    """What users were told against what was learnt, once all has been."""
    told = wheel.told
    acknowledged = list(dict.fromkeys(told.comparisons))
    store = wheel.deployment.store
    accepted: dict[str, str] = {}

    async def all_are_decided() -> bool:
        records = await client.feedback(acknowledged)
        held = [one for one in records if one.state == FeedbackState.FEEDBACK_STATE_HELD]
        accepted.clear()
        accepted.update(
            {
                one.feedback_id: one.comparison_id
                for one in records
                if one.state == FeedbackState.FEEDBACK_STATE_ACCEPTED
            }
        )
        report.lost = [f"{id} is not in the record" for id in set(acknowledged) - {one.feedback_id for one in records}]
        return not held

    await until(all_are_decided, timeout=_WAIT_SECONDS, every=0.5)

    def learnt() -> Counter[str]:
        versions = [manifest.version for manifest in store.versions(POLICY) if manifest.sequence]
        return Counter(id for version in versions for id in store.read(version, SAMPLES).decode().split())

    async def all_is_learnt() -> bool:
        return set(accepted.values()) <= (await asyncio.to_thread(learnt)).keys()

    with contextlib.suppress(TimeoutError):
        await until(all_is_learnt, timeout=_WAIT_SECONDS, every=1.0)
    counts = learnt()
    report.acknowledged = len(acknowledged)
    report.lost += [f"{id} was acknowledged and is not learnt" for id, one in accepted.items() if one not in counts]
    report.learnt_twice = [id for id, count in counts.items() if count > 1]
    verified = {manifest.version for manifest in store.versions(POLICY)}
    report.unverified = sorted(told.versions - verified)
    report.retries = (len(acknowledged) + told.done_again) / len(acknowledged)


def main() -> int:
    """Parses the arguments, runs, and says how it went; status 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1, help="of each part (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    report = asyncio.run(run(given.kills, given.seed, lambda line: print(line, flush=True)))
    for kind in ("lost", "learnt_twice", "unverified"):
        for violation in getattr(report, kind):
            print(f"  {kind.upper()}: {violation}")
    print(json.dumps(report.to_json()))
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
