"""The whole wheel on a tiny model: every part as a process of its own, and a preference that goes all the way round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import free_base_port, make_tiny_llama, until
from thumbwheel import errors
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.client import AsyncClient
from thumbwheel.stack import PartDied, Stack, StackSettings, read_addresses
from thumbwheel.status import read_status
from thumbwheel.v1.policy_pb2 import SamplingParams
from thumbwheel.v1.preference_pb2 import FEEDBACK_STATE_ACCEPTED, FEEDBACK_STATE_APART, FEEDBACK_STATE_RECORDED
from thumbwheel.v1.rollout_pb2 import ModelRole

pytestmark = pytest.mark.timeout(420)
ENVIRONMENT = {
    "THUMBWHEEL_LEARN_FROM_CUT": "true",  # every answer is cut here
    "THUMBWHEEL_MAX_MODEL_LEN": "512",
    "THUMBWHEEL_ROUND_SIZE": "8",
    "THUMBWHEEL_MAX_WAIT_SECONDS": "600",
    "THUMBWHEEL_POLICY_LEARNING_RATE": "1e-3",
    "THUMBWHEEL_REWARD_LEARNING_RATE": "1e-3",
}
SHORT = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    """A deployment on a tiny model."""
    model = make_tiny_llama(tmp_path / "tiny", seed=0)
    return StackSettings(home=tmp_path / "home", base_port=free_base_port(), model=str(model))


def _client(settings: StackSettings) -> AsyncClient:
    at = settings.addresses
    return AsyncClient(policy=at.policy, reward=at.reward, collector=at.collector, timeout=60.0)


async def _compare(client: AsyncClient, count: int, user: str) -> list[str]:
    """`count` verdicts; returns their feedback ids."""
    ids = []
    for index in range(count):
        shown = await client.candidates(f"Question {index} of {user}", sampling=SHORT, user_id=user)
        a, b = shown.candidates
        acked = await client.compare(a, b, "a" if index % 2 else "b", user_id=user)
        ids.append(acked.feedback_id)
    return ids


def _version(get: Callable[[], Awaitable[Any]], name: str) -> Callable[[], Awaitable[bool]]:
    async def live() -> bool:
        return bool((await get()).version == name)

    return live


def _cli(settings: StackSettings, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thumbwheel.cli", *arguments, "--home", str(settings.home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _started_since(before: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes of the stack: children of this one, but for those that other tests still have, such as a database."""
    return [process for process in psutil.Process().children(recursive=True) if process not in before]


def _start(settings: StackSettings, log: Path) -> subprocess.Popen[bytes]:
    """`thumbwheel up`, in a process group of its own."""
    command = [sys.executable, "-m", "thumbwheel.cli", "up", "--home", str(settings.home)]
    command += ["--base-port", str(settings.base_port), "--model", settings.model]
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("w") as out:
            return subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT}, start_new_session=True
            )
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.asynccontextmanager
async def _up(settings: StackSettings) -> AsyncIterator[subprocess.Popen[bytes]]:
    """`thumbwheel up` when it is, killed at the end with all that it started if it is still there."""
    log = settings.home.parent / "up.log"
    up = _start(settings, log)

    async def is_up() -> bool:
        assert up.poll() is None, log.read_text()
        return "Thumbwheel is up" in log.read_text()

    try:
        await until(is_up, timeout=180)
        yield up
    finally:
        if up.poll() is None:
            for process in psutil.Process(up.pid).children(recursive=True):
                process.kill()
            up.kill()
            up.wait(60)


async def test_the_wheel_turns_until_ctrl_c_stops_everything(settings: StackSettings) -> None:
    async with _up(settings) as up, _client(settings) as client:
        assert read_addresses(settings.home) == settings.addresses
        store = LocalStore(settings.store_path, ManifestVerifier.load(settings.keys_path))
        assert (await client.policy()).version == "policy-000000"
        untaught = await client.judge("Which?", "one", "other")
        assert (untaught.version, untaught.probability_a) == ("reward-000000", 0.5)  # no opinion yet

        shown = (await client.candidates("A tie?", sampling=SHORT)).candidates
        tie = await client.compare(shown[0], shown[1], "tie", user_id="u")
        thumb = await client.thumb(shown[0], up=True, user_id="u")
        ids = await _compare(client, 8, "u")
        await until(_version(client.policy, "policy-000001"), timeout=180)
        await until(_version(client.reward, "reward-000001"), timeout=180)

        records = {
            record.feedback_id: record for record in await client.feedback([*ids, tie.feedback_id, thumb.feedback_id])
        }
        assert {records[i].state for i in ids} == {FEEDBACK_STATE_ACCEPTED}
        assert (records[tie.feedback_id].state, records[tie.feedback_id].reason) == (FEEDBACK_STATE_APART, "tie")
        assert records[thumb.feedback_id].state == FEEDBACK_STATE_RECORDED
        expected = sorted(records[i].comparison_id for i in ids)
        for role, objective in ((ModelRole.MODEL_ROLE_POLICY, "dpo"), (ModelRole.MODEL_ROLE_REWARD, "reward")):
            newest = store.latest(role)
            assert newest is not None
            learnt = (store.load(newest.version).path / "samples.txt").read_text().split()
            assert learnt == expected
            assert newest.lineage.objective == objective
            assert newest.parent.endswith("-000000")
            assert newest.lineage.sample_count == 8
        answer = await client.generate("And now?", sampling=SHORT)
        assert [span.version for span in answer.spans] == ["policy-000001"]
        taught = await client.judge("Which?", "one", "other")
        assert taught.probability_a != 0.5

        status = await read_status(client, settings.addresses)
        assert status.away == {}
        assert (status.policy_version, status.reward_version) == ("policy-000001", "reward-000001")
        assert (status.feedback, status.learnt, status.held, status.outbox) == (10, 16, 0, 0)

        told = await asyncio.to_thread(_cli, settings, "status", "--json")
        assert json.loads(told.stdout)["policy_version"] == "policy-000001"
        told = await asyncio.to_thread(_cli, settings, "versions", "--json")
        assert [v["version"] for v in json.loads(told.stdout)] == [
            "policy-000001",
            "policy-000000",
            "reward-000001",
            "reward-000000",
        ]
        told = await asyncio.to_thread(_cli, settings, "generate", "Hello", "-n", "2", "--max-tokens", "8", "--json")
        assert len(json.loads(told.stdout)) == 2, told.stderr
        told = await asyncio.to_thread(_cli, settings, "feedback", "compare", "a", "--json")
        assert json.loads(told.stdout)["duplicate"] is False, told.stderr

        processes = psutil.Process(up.pid).children(recursive=True)
        assert len(processes) >= 6
        up.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(up.wait, 60) == 130
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    told = await asyncio.to_thread(_cli, settings, "status")
    assert told.returncode == 1
    assert "thumbwheel up" in told.stderr


async def test_when_a_part_dies_the_rest_is_stopped_and_it_is_named(settings: StackSettings) -> None:
    processes: list[psutil.Process] = []
    before = psutil.Process().children(recursive=True)

    async def kill_the_collector() -> None:
        async with Stack.running(settings, environment=ENVIRONMENT) as stack:
            processes.extend(_started_since(before))
            os.kill(stack.parts["collector"].process.pid, signal.SIGKILL)
            await asyncio.Event().wait()  # cut short by the death

    with pytest.raises(PartDied) as caught:
        await asyncio.wait_for(kill_the_collector(), 300)
    assert "collector was killed by SIGKILL" in str(caught.value)
    assert str(settings.logs_path / "collector.log") in str(caught.value)
    assert len(processes) >= 6
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


async def test_a_taken_port_is_named_before_anything_starts(settings: StackSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.base_port + 2))
        taken.listen()
        with pytest.raises(errors.PortInUse, match=f"reward needs 127.0.0.1:{settings.base_port + 2}"):
            async with Stack.running(settings):
                pytest.fail("it started")
    assert not settings.home.exists()


async def test_a_missing_model_is_named(settings: StackSettings, tmp_path: Path) -> None:
    missing = settings.model_copy(update={"model": str(tmp_path / "nowhere")})
    with pytest.raises(PartDied, match="nowhere"):
        async with Stack.running(missing):
            pytest.fail("it started")
