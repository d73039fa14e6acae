"""All parts on one machine: started in order, waited for, watched, and stopped together.

    keys → broker ─┐
    base model → version 0 ─┴→ collector · policy · reward (· reference) · trainer → every one SERVING

A part is a process of its own, in a session of its own, logging to a file. When one dies the rest are stopped, and the
error says which, why, and where its log is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import Field

from thumbwheel import errors
from thumbwheel.channels import open_channel
from thumbwheel.children import tied
from thumbwheel.config import Settings, split_address
from thumbwheel.tls import ClientTls

_LOG_TAIL_BYTES = 16_384
_KILL_SECONDS = 10.0
STATE_FILE = "up.json"
REFERENCE = "policy-000000"
"""The version that the reference serves."""

Progress = Callable[[str], None]


class StackSettings(Settings):
    """Runs every part on this machine."""

    base_port: int = Field(default=50050, ge=1024, le=65000)
    """Policy, reward, collector, trainer and reference listen on the five ports after it, the embedded broker on the
    ninth, the collector's control plane on the thirteenth, and their metrics on ports 51 and up above it."""

    host: str = "127.0.0.1"
    """Address that all parts listen on."""

    kafka: str = ""
    """Kafka brokers to use, "host:port" separated by commas; empty starts the embedded broker."""

    model: str = ""
    """Base model: a Hugging Face id or a local folder; empty is SmolLM2-135M-Instruct."""

    serve_reference: bool = False
    """Also serve the reference policy, which is version 0, and tell scores over its response to the same prompt. Takes
    the memory of a further engine, and each new prompt that is scored is answered by it first."""

    start_timeout_seconds: float = Field(default=300.0, gt=0)
    """How long the parts may take to be ready."""

    stop_timeout_seconds: float = Field(default=45.0, gt=0)
    """How long a part may take to stop before it is killed."""

    @property
    def addresses(self) -> Addresses:
        """Where everything listens."""
        ports = [f"{self.host}:{self.base_port + offset}" for offset in (1, 2, 3, 4, 5, 9, 13)]
        policy, reward, collector, trainer, reference, broker, control = ports
        kafka, metrics_base = self.kafka or broker, self.base_port + 50
        return Addresses(
            policy,
            reward,
            collector,
            control,
            trainer,
            kafka,
            not self.kafka,
            metrics_base,
            reference if self.serve_reference else "",
        )

    @property
    def logs_path(self) -> Path:
        """Folder of the parts' logs."""
        return self.home / "logs"


@dataclass(frozen=True)
class Addresses:
    """Where the parts of a stack listen; kept in `up.json` in its home, for the commands that talk to it."""

    policy: str
    reward: str
    collector: str
    control: str
    trainer: str
    kafka: str
    embedded_broker: bool
    metrics_base: int
    reference: str = ""
    """Empty where none is served."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that run on this machine: the broker only where it is the embedded one."""
        there = {"broker": self.embedded_broker, "reference": bool(self.reference)}
        return tuple(part for part in PARTS if there.get(part, True))

    @property
    def policies(self) -> str:
        """All policy servers, as the collector takes them."""
        return ",".join(filter(None, (self.policy, self.reference)))

    def metrics_port(self, part: str) -> int:
        """Port of a part's metrics."""
        return self.metrics_base + 1 + PARTS.index(part)


PARTS = ("policy", "reward", "collector", "trainer", "broker", "reference")


def read_addresses(home: Path) -> Addresses:
    """Where the stack of this home listens; the defaults where none has been started. Raises `FailedPrecondition`."""
    path = home / STATE_FILE
    try:
        return Addresses(**json.loads(path.read_text()))
    except FileNotFoundError:
        return StackSettings().addresses
    except (ValueError, TypeError) as error:
        raise errors.FailedPrecondition(
            f"{path} is unreadable: {error}.", remedy="Type `thumbwheel up` anew."
        ) from error


@dataclass
class Part:
    """A running process."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    started: float = field(default_factory=time.monotonic)

    def last_words(self) -> str:
        """The last error in its log, for people."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("level") in ("critical", "error"):
                    return str(entry["message"])
        return next((line.strip() for line in reversed(lines) if line.strip()), "It said nothing.")


class PartDied(errors.FailedPrecondition):
    """A part of the stack ended when nobody asked it to."""


class Stack:
    """The parts of one deployment on this machine. Use `running`."""

    def __init__(self, settings: StackSettings, environment: Mapping[str, str], progress: Progress) -> None:
        self.settings = settings
        self.addresses = settings.addresses
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._progress = progress
        self.parts: dict[str, Part] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        settings: StackSettings,
        *,
        environment: Mapping[str, str] | None = None,
        progress: Progress = lambda _: None,
    ) -> AsyncIterator[Stack]:
        """Starts everything and, whatever happens, stops everything.

        `environment` holds settings of single parts as `THUMBWHEEL_*` variables. Raises `errors.PortInUse`,
        `errors.MissingModel`, or `PartDied`, also while the caller is inside: the caller is then cancelled.
        """
        stack = cls(settings, environment or {}, progress)
        try:
            await stack._start()
            owner = asyncio.current_task()
            assert owner is not None
            watching = asyncio.create_task(stack._watch(owner), name="watch")
            try:
                yield stack
            except asyncio.CancelledError:
                if watching.done() and not watching.cancelled() and (death := watching.exception()) is not None:
                    owner.uncancel()
                    raise death from None
                raise
            finally:
                watching.cancel()
        finally:
            await stack._stop()

    async def _watch(self, owner: asyncio.Task[object]) -> None:
        waits = {asyncio.create_task(part.process.wait(), name=name): part for name, part in self.parts.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        part = waits[done.pop()]
        owner.cancel()
        raise self._obituary(part)

    def _obituary(self, part: Part) -> PartDied:
        code = part.process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"ended with status {code}"
        )
        return PartDied(f"{part.name} {how}: {part.last_words()}", remedy=f"Its log is {part.log}.")

    async def _start(self) -> None:
        settings, at = self.settings, self.addresses
        self._check_ports()
        for folder in (settings.home, settings.logs_path):
            folder.mkdir(parents=True, exist_ok=True)
        from thumbwheel.auth import create_keys

        create_keys(settings.keys_path)
        common = ["--home", str(settings.home), "--bootstrap-servers", at.kafka, "--log-level", settings.log_level]
        common += ["--trace-endpoint", settings.trace_endpoint] if settings.trace_endpoint else []

        def where(part: str, address: str) -> list[str]:
            return [*common, "--listen", address, "--metrics-port", str(at.metrics_port(part))]

        async with _deadline(settings.start_timeout_seconds, settings.logs_path):
            if at.embedded_broker:
                self._progress("starting the broker")
                log = settings.logs_path / "tansu.log"
                broker = [
                    "--listen",
                    at.kafka,
                    "--log",
                    str(log),
                    "--metrics-port",
                    str(at.metrics_port("broker")),
                ]
                await self._spawn("broker", ["-m", "thumbwheel.stream.broker", *broker])
            await self._prepare_versions(common)
            self._progress("starting collector, policy, reward and trainer")
            asking = ["--reward", at.reward]  # what it is unsure of is what people are asked
            asking += ["--control-listen", at.control, "--policies", at.policies]
            await self._spawn("collector", ["-m", "services.collector", *asking, *where("collector", at.collector)])
            await self._spawn("policy", ["-m", "services.policy", *where("policy", at.policy)])
            scoring = ["--reference", at.reference, "--reference-version", REFERENCE] if at.reference else []
            await self._spawn("reward", ["-m", "services.reward", *scoring, *where("reward", at.reward)])
            if at.reference:
                pinned = ["-m", "services.policy", "--serve-version", REFERENCE]
                await self._spawn("reference", [*pinned, *where("reference", at.reference)])
            serving = ["--policy", at.policy, "--reward", at.reward]  # rollouts come from them
            await self._spawn("trainer", ["-m", "trainer", *serving, *where("trainer", at.trainer)])
            await self._all_serving({name: getattr(at, name) for name in at.parts if name != "broker"})
        (settings.home / STATE_FILE).write_text(json.dumps(asdict(at), indent=2))

    async def _prepare_versions(self, common: Sequence[str]) -> None:
        """Publishes version 0 of both roles, once. Needs torch, so it is a process of its own."""
        store = self.settings.store_path
        if all((store / name).is_dir() for name in ("policy-000000", "reward-000000")):
            return
        self._progress("fetching the base model and publishing version 0")
        model = ["--base-model", self.settings.model] if self.settings.model else []
        part = await self._spawn("init", ["-m", "trainer", "--init-only", *model, *common])
        if await part.process.wait() != 0:
            raise self._obituary(part)
        del self.parts["init"]

    async def _spawn(self, name: str, arguments: Sequence[str]) -> Part:
        path = self.settings.logs_path / f"{name}.log"
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *tied(sys.executable, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours to hand on, in order
            )
        part = Part(name, process, path)
        self.parts[name] = part
        return part

    async def _all_serving(self, addresses: Mapping[str, str]) -> None:
        """Waits for gRPC health of each; fails at once when a part dies first."""
        tls = ClientTls.from_environment()  # the trainer has no calls to encrypt
        ready = {
            asyncio.create_task(_serving(address, None if name == "trainer" else tls), name=name)
            for name, address in addresses.items()
        }
        deaths = {asyncio.create_task(part.process.wait(), name=name): part for name, part in self.parts.items()}
        try:
            while ready:
                done, _ = await asyncio.wait({*ready, *deaths}, return_when=asyncio.FIRST_COMPLETED)
                for death, part in deaths.items():
                    if death in done:
                        raise self._obituary(part)
                for served in ready & done:
                    await served
                    ready.discard(served)
                    self._progress(f"{served.get_name()} is serving")
        except asyncio.CancelledError:
            self._progress(f"not ready: {', '.join(sorted(task.get_name() for task in ready))}")
            raise
        finally:
            for task in (*ready, *deaths):
                task.cancel()

    def _check_ports(self) -> None:
        """Fails before anything is started where a port is taken. Raises `errors.PortInUse`."""
        at = self.addresses
        wanted = {"policy": at.policy, "reward": at.reward, "collector": at.collector, "trainer": at.trainer}
        wanted["the control plane"] = at.control
        if at.embedded_broker:
            wanted["broker"] = at.kafka
        if at.reference:
            wanted["reference"] = at.reference
        wanted |= {f"{part}'s metrics": f"{self.settings.host}:{at.metrics_port(part)}" for part in at.parts}
        for part, address in wanted.items():
            if not is_free(address):
                raise errors.PortInUse(
                    f"{part} needs {address}, but another process listens there.",
                    remedy=f"Stop it, or choose other ports with --base-port {self.settings.base_port + 100}.",
                )

    async def _stop(self) -> None:
        """Asks in the opposite order of starting, all at once; kills what does not end in time, with its children."""
        for part in reversed(self.parts.values()):
            if part.process.returncode is None:
                part.process.terminate()
        waits = [asyncio.create_task(part.process.wait()) for part in self.parts.values()]
        if waits:
            await asyncio.wait(waits, timeout=self.settings.stop_timeout_seconds)
        await asyncio.gather(*(_end_session(part.process.pid) for part in self.parts.values()))
        (self.settings.home / STATE_FILE).unlink(missing_ok=True)


async def _end_session(leader: int) -> None:
    """Kills what is left of a part and its children, and waits until the kernel has let go of them."""
    with contextlib.suppress(ProcessLookupError, TimeoutError):  # gone; or stuck in the kernel, beyond our reach
        async with asyncio.timeout(_KILL_SECONDS):
            while True:
                os.killpg(leader, signal.SIGKILL)
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _deadline(seconds: float, logs: Path) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise errors.DeadlineExceeded(
            f"The parts were not all ready within {seconds:g} s.",
            remedy=f"Their logs are in {logs}; a slower machine needs a longer --start-timeout-seconds.",
        ) from error


def is_free(address: str) -> bool:
    """True where nothing listens on "host:port"."""
    import socket

    host, port = split_address(address)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


async def _serving(address: str, tls: ClientTls | None) -> None:
    """Returns when the server at `address` says SERVING. Connects as soon as it listens."""
    options = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
    async with open_channel(address, tls=tls, options=options) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                async for answer in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
