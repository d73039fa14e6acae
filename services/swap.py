"""The swap of a running engine's weights: all or nothing, and true.

    verify    tensors, dtypes, shapes, tokenizer, finite weights            serving goes on
    load      the new weights, beside the old ones
    wait      calls that need one version throughout end; others wait
    pause     requests are frozen, ended or awaited; KV and prefix caches go   no token of old keys with new weights
    exchange  the new weights take the place of the old                     ┐
    probe     what the manifest says they compute, within a tolerance       │ on any fault:
    label     tokens are of the new version from here on                    ┘ restore the old weights, and probe them
    resume    requests go on, their prefix computed anew

Swaps take turns, and of those that wait only the newest is done. docs/swaps.md says what comes of which fault.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram

from services.config import SwapSettings
from services.probes import Probes
from services.turnstile import Turnstile
from thumbwheel import errors
from thumbwheel.checkpoints import tensors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.policy_pb2 import Swap, SwapOutcome

logger = logging.getLogger(__name__)
tracer = trace.get_tracer("thumbwheel.swap")

SWAPS = Counter("thumbwheel_swaps_total", "Swaps of the live weights, by outcome.", ["outcome"])
for _outcome in SwapOutcome.keys()[1:]:
    SWAPS.labels(_outcome.removeprefix("SWAP_OUTCOME_").lower())  # from 0 on, or the first would be no increase
SWAP_SECONDS = Histogram(
    "thumbwheel_swap_seconds",
    "Time of each step of a swap; `paused` is how long no token was produced.",
    ["step"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
STEP_FAILURES = Counter("thumbwheel_swap_step_failures_total", "Steps of swaps that failed.", ["step"])
LIVE_SEQUENCE = Gauge("thumbwheel_live_version_sequence", "Number of the live version within its role.")

SWAPS_REMEMBERED = 256
_LOOK_SECONDS = 0.05

PauseMode = Literal["keep", "wait", "abort"]


@contextmanager
def step(name: str, **attributes: str) -> Iterator[None]:
    """Times a step of a swap and traces it."""
    with tracer.start_as_current_span(f"swap.{name}", attributes=attributes), SWAP_SECONDS.labels(name).time():
        try:
            yield
        except BaseException:
            STEP_FAILURES.labels(name).inc()
            raise


class Swapper:
    """Which version an engine serves, and the only way to another."""

    def __init__(
        self, llm: Any, live: VerifiedVersion, settings: SwapSettings, turnstile: Turnstile, probes: Probes
    ) -> None:
        self.live = live
        self.previous: VerifiedVersion | None = None
        """What was live before, where the last swap went forward: the version to go back to."""
        self.swaps: deque[Swap] = deque(maxlen=SWAPS_REMEMBERED)
        self._llm, self._settings, self._turnstile, self._probes = llm, settings, turnstile, probes
        self._turn = asyncio.Lock()
        self._asked = 0
        self._running: set[asyncio.Task[Swap]] = set()
        self.broken: errors.Internal | None = None
        """Set where neither the new nor the old weights could be loaded."""
        self._record(live, SwapOutcome.SWAP_OUTCOME_LIVE)
        LIVE_SEQUENCE.set(live.manifest.sequence)

    async def swap(self, target: VerifiedVersion, *, mode: PauseMode | None = None) -> Swap:
        """Serves `target` from now on; `mode`, where given, goes before the setting.

        `target` lies on the local disk, its hashes verified. Returns what came of it: superseded by a newer request
        while it waited, refused before serving was touched, rolled back, or live. Once begun, a swap comes to its end
        even where the caller is cancelled. Raises `errors.Unavailable` where calls in flight did not end in time, for
        which serving was not touched either, and `errors.Internal` where neither the new nor the old weights could be
        loaded: the process must then be restarted.
        """
        return await self._begin(target, mode, back=False)

    async def rollback(self) -> Swap:
        """Goes back to the version before, which is still on the local disk. Raises `errors.FailedPrecondition` where
        there is none, and what `swap` raises.
        """
        if self.previous is None:
            raise errors.FailedPrecondition(
                f"There is no version before {self.live.manifest.version} to go back to on this server.",
                remedy="Name the version to serve instead.",
            )
        return await self._begin(self.previous, None, back=True)

    async def _begin(self, target: VerifiedVersion, mode: PauseMode | None, *, back: bool) -> Swap:
        self._asked += 1
        task = asyncio.create_task(self._in_turn(target, mode or self._settings.swap_mode, self._asked, back=back))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Swap]) -> None:
        # Its caller may have gone; what must not be missed is noticed by whoever watches the engine.
        self._running.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), errors.Internal):
            self.broken = error

    async def _in_turn(self, target: VerifiedVersion, mode: PauseMode, number: int, *, back: bool) -> Swap:
        async with self._turn:
            if number != self._asked:
                return self._record(target, SwapOutcome.SWAP_OUTCOME_SUPERSEDED)
            attributes = {"from": self.live.manifest.version, "to": target.manifest.version, "mode": mode}
            with tracer.start_as_current_span("swap", attributes=attributes) as span:
                outcome = await self._swap(target, mode, back=back)
                span.set_attribute("outcome", SwapOutcome.Name(outcome.outcome))
                return outcome

    async def _swap(self, target: VerifiedVersion, mode: PauseMode, *, back: bool) -> Swap:
        limits = self._settings
        try:
            with step("verify"):
                async with asyncio.timeout(limits.swap_verify_seconds):
                    await asyncio.to_thread(check, self.live, target)
        except (errors.CorruptCheckpoint, OSError) as error:
            return self._record(target, SwapOutcome.SWAP_OUTCOME_REFUSED, error=str(error))
        except TimeoutError:
            return self._record(target, SwapOutcome.SWAP_OUTCOME_REFUSED, error="It was not verified in time.")
        try:
            with step("load"):
                async with asyncio.timeout(limits.swap_load_seconds):
                    staged = await self._load_beside(target)
        except Exception as error:  # whatever it is, the weights in use were not touched
            logger.exception("%s could not be loaded", target.manifest.version)
            await self._end_staging()
            return self._record(target, SwapOutcome.SWAP_OUTCOME_REFUSED, error=f"{type(error).__name__}: {error}")
        try:
            async with self._turnstile.swap(limits.swap_wait_seconds, waiting=step("wait")):
                return await self._replace(target, mode, staged=staged, back=back)
        except TimeoutError as error:
            message = "Calls in flight did not end in time."
            self._record(target, SwapOutcome.SWAP_OUTCOME_REFUSED, error=message)
            raise errors.Unavailable(message, remedy="It is tried again.") from error
        finally:
            await self._end_staging()

    async def _load_beside(self, target: VerifiedVersion) -> bool:
        """The new weights beside the old ones. False where the workers replace theirs in place."""
        if not all(await self._llm.collective_rpc("stage", kwargs={"weights_path": str(target.path)})):
            return False
        while not all(await self._llm.collective_rpc("staged")):  # noqa: ASYNC110 - only asking can tell
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    async def _end_staging(self) -> None:
        """Lets go of the weights that are not in use. They cost memory and nothing else, so a fault here is only said;
        an engine that has died is noticed by whoever watches it.
        """
        try:
            async with asyncio.timeout(self._settings.swap_resume_seconds):
                await self._llm.collective_rpc("end_staging")
        except Exception:
            logger.exception("the weights that are not in use stay in memory")

    async def _replace(self, target: VerifiedVersion, mode: PauseMode, *, staged: bool, back: bool) -> Swap:
        """From the pause to the end. Whatever happens, either version serves afterwards, or `errors.Internal`."""
        before, started, failure, exchanged = self.live, time.perf_counter(), "", False
        name, limits = target.manifest.version, self._settings
        try:
            try:
                await self._pause(mode)
            except Exception as error:
                logger.exception("the engine did not pause for %s", name)
                await self._resume()
                self._record(target, SwapOutcome.SWAP_OUTCOME_REFUSED, error=f"It did not pause: {error!r}")
                raise errors.Unavailable(f"The engine did not pause for {name}: {error!r}.") from error
            try:
                with step("exchange"):
                    async with asyncio.timeout(limits.swap_load_seconds):
                        if staged:
                            await self._llm.collective_rpc("exchange_weights")
                            exchanged = True
                        else:
                            await self._llm.collective_rpc("swap_weights", kwargs={"weights_path": str(target.path)})
                with step("probe"):
                    async with asyncio.timeout(limits.swap_probe_seconds):
                        await self._probes.check(target)
                with step("label"):
                    async with asyncio.timeout(limits.swap_resume_seconds):
                        await self._llm.update_weight_version(name)
            except Exception as error:  # whatever went wrong, the old weights must come back before we resume
                logger.exception("swap to %s failed; putting %s back", name, before.manifest.version)
                failure = f"{type(error).__name__}: {error}"
                await self._restore(before, exchanged=exchanged)
            await self._resume()
        except errors.Unavailable:
            raise
        except Exception as error:
            raise errors.Internal(
                f"The swap to {name} failed, and so did the way back to {before.manifest.version}: {error!r}.",
                remedy="Restart this server: it starts with the newest version that verifies.",
            ) from error
        pause = time.perf_counter() - started
        SWAP_SECONDS.labels("paused").observe(pause)
        if failure:
            return self._record(target, SwapOutcome.SWAP_OUTCOME_ROLLED_BACK, pause=pause, error=failure)
        self.live, self.previous = target, None if back else before
        LIVE_SEQUENCE.set(target.manifest.sequence)
        return self._record(target, SwapOutcome.SWAP_OUTCOME_LIVE, pause=pause)

    async def _pause(self, mode: PauseMode) -> None:
        limit = self._settings.swap_wait_seconds if mode == "wait" else self._settings.swap_pause_seconds
        with step("pause"):
            async with asyncio.timeout(limit):
                # "keep" freezes running requests; clearing the caches makes the engine prefill them again.
                await self._llm.pause_generation(mode=mode, clear_cache=True)

    async def _resume(self) -> None:
        with step("resume"):
            async with asyncio.timeout(self._settings.swap_resume_seconds):
                await self._llm.resume_generation()

    async def _restore(self, before: VerifiedVersion, *, exchanged: bool) -> None:
        """The old weights, and proof that they compute what they computed before. From where the exchange has put them,
        or, where it cannot be known what it has done or there was none, from the local disk.

        A load that ran out of time is still under way in the workers, which do one thing after the other: so this step
        has a longer time-out than that one.
        """
        with step("restore"):
            async with asyncio.timeout(self._settings.swap_restore_seconds):
                if exchanged:
                    await self._llm.collective_rpc("exchange_weights")
                else:
                    await self._llm.collective_rpc("swap_weights", kwargs={"weights_path": str(before.path)})
                await self._probes.check_restored(before)
                await self._llm.update_weight_version(before.manifest.version)

    def _record(
        self, version: VerifiedVersion, outcome: SwapOutcome.ValueType, *, pause: float = 0.0, error: str = ""
    ) -> Swap:
        swap = Swap(version=version.manifest.version, outcome=outcome, pause_seconds=pause, error=error)
        swap.at.GetCurrentTime()
        self.swaps.append(swap)
        name = SwapOutcome.Name(outcome).removeprefix("SWAP_OUTCOME_").lower()
        SWAPS.labels(name).inc()
        log = logger.error if error else logger.info
        log("swap %s: %s", swap.version, name, extra={"pause_seconds": round(pause, 3), "error": error})
        return swap


def check(live: VerifiedVersion, target: VerifiedVersion) -> None:
    """Raises `errors.CorruptCheckpoint` where `target` cannot take the place of `live` in a running engine, or has
    weights that are no numbers. Reads all its weights, which leaves them in the page cache for the load.
    """
    check_compatible(live, target)
    for path in sorted(target.path.glob("*.safetensors")):
        tensors.require_finite(path)


def check_compatible(live: VerifiedVersion, target: VerifiedVersion) -> None:
    """Raises `errors.CorruptCheckpoint` where tensors, dtypes, shapes or tokenizers differ."""
    have, want = tensors.table(target.path), tensors.table(live.path)
    remedy = "Serve it from a server started on it instead."
    if different := sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name)):
        name = different[0]
        raise errors.CorruptCheckpoint(
            f"{target.manifest.version} does not fit {live.manifest.version}: {len(different)} tensors differ, such as "
            f"{name}: {have.get(name)} instead of {want.get(name)}.",
            remedy=remedy,
        )
    if _tokenizer_hashes(live) != _tokenizer_hashes(target):
        raise errors.CorruptCheckpoint(
            f"{target.manifest.version} has another tokenizer than {live.manifest.version}.", remedy=remedy
        )


def _tokenizer_hashes(version: VerifiedVersion) -> dict[str, str]:
    return {
        file.path: file.sha256
        for file in version.manifest.files
        if file.path.startswith(("tokenizer", "chat_template"))
    }
