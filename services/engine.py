"""The vLLM engine that policy and reward share: started on a verified version, its weights replaced in place.

A swap, all or nothing:

    verify the version (files, signature, shapes, tokenizer)   serving goes on
    pause, keeping requests; drop KV and prefix caches          no token of old keys with new weights
    reload weights → relabel                                    on any fault: reload the old ones
    resume                                                      requests go on, their prefix computed anew
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import time
from collections import deque
from pathlib import Path
from typing import Any, Self

from prometheus_client import Counter, Gauge, Histogram

from services.config import EngineSettings
from services.turnstile import Turnstile
from thumbwheel import errors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.policy_pb2 import Swap, SwapOutcome

logger = logging.getLogger(__name__)

SWAPS = Counter("thumbwheel_swaps_total", "Swaps of the live weights, by outcome.", ["outcome"])
SWAP_SECONDS = Histogram(
    "thumbwheel_swap_seconds",
    "Time of each step of a swap.",
    ["step"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
LIVE_SEQUENCE = Gauge("thumbwheel_live_version_sequence", "Number of the live version within its role.")

SWAPS_REMEMBERED = 256


class Engine:
    """An `AsyncLLM` and the version it serves. Made by `start`; ended by `close`."""

    def __init__(self, llm: Any, version: VerifiedVersion, swap_timeout: float) -> None:
        self.llm = llm
        self.live = version
        self._swap_timeout = swap_timeout
        self._swapping = asyncio.Lock()
        # Scores carry no version of their own, so calls that need one version throughout pass through here.
        self.turnstile = Turnstile()
        self.swaps: deque[Swap] = deque(maxlen=SWAPS_REMEMBERED)
        self._record(version.manifest.version, SwapOutcome.SWAP_OUTCOME_LIVE)
        LIVE_SEQUENCE.set(version.manifest.sequence)

    @classmethod
    async def start(cls, version: VerifiedVersion, settings: EngineSettings, *, pooling: bool) -> Self:
        """Loads the version; `pooling` scores (a sequence classifier) rather than generates.

        Raises `errors.FailedPrecondition` where vLLM cannot serve it.
        """
        # Read by vLLM's CPU backend when its worker starts; a GPU build ignores them.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_threads_bind
        # We configure logging ourselves; vLLM's own lines stay on standard error.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        kwargs: dict[str, Any] = (
            {"runner": "pooling", "convert": "classify"} if pooling else {"scheduling_policy": "priority"}
        )
        args = AsyncEngineArgs(
            model=str(version.path),
            dtype="bfloat16",
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            enforce_eager=current_platform.is_cpu(),
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
            enable_prefix_caching=True,
            worker_extension_cls="services.worker.SwapWorker",
            disable_log_stats=False,
            **kwargs,
        )
        try:
            llm = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
        except (RuntimeError, ValueError) as error:
            raise errors.FailedPrecondition(
                f"vLLM cannot serve {version.path}: {error}.", remedy="The lines above say why."
            ) from error
        await llm.collective_rpc("keep_seeds")
        await llm.update_weight_version(version.manifest.version)
        logger.info("engine started", extra={"version": version.manifest.version})
        return cls(llm, version, settings.swap_timeout_seconds)

    @property
    def version(self) -> str:
        """The version that new requests are served with."""
        return self.live.manifest.version

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the KV cache holds; None where the engine does not say."""
        cache = self.llm.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None

    async def swap(self, target: VerifiedVersion) -> Swap:
        """Serves `target` from now on; requests in flight go on with it. One swap at a time; the rest wait.

        `target` has been verified against its manifest by the store. Returns what came of it: a version that does not
        fit the engine is refused before serving is touched; a fault midway puts the old weights back. Raises
        `errors.Internal` where even that fails: the process must then be restarted.
        """
        async with self._swapping:
            name = target.manifest.version
            try:
                check_compatible(self.live, target)
            except errors.CorruptCheckpoint as error:
                return self._record(name, SwapOutcome.SWAP_OUTCOME_REFUSED, error=str(error))
            try:
                async with self.turnstile.swap(self._swap_timeout):
                    return await self._swap(target)
            except TimeoutError:
                return self._record(
                    name, SwapOutcome.SWAP_OUTCOME_REFUSED, error="Calls in flight did not end in time."
                )

    async def _swap(self, target: VerifiedVersion) -> Swap:
        name = target.manifest.version
        before, started = self.live, time.perf_counter()
        try:
            try:
                await self._replace(target)
                self.live = target
            except Exception as error:  # whatever went wrong, the old weights must come back before we resume
                logger.exception("swap to %s failed; putting %s back", name, before.manifest.version)
                await self._replace(before)
                failure: str | None = f"{type(error).__name__}: {error}"
            else:
                failure = None
            async with asyncio.timeout(self._swap_timeout):
                await self.llm.resume_generation()
        except Exception as error:
            raise errors.Internal(
                f"The swap to {name} failed, and so did the way back to {before.manifest.version}: {error!r}.",
                remedy="Restart this server: it starts with the newest version that verifies.",
            ) from error
        pause = time.perf_counter() - started
        SWAP_SECONDS.labels("total").observe(pause)
        if failure is not None:
            return self._record(name, SwapOutcome.SWAP_OUTCOME_ROLLED_BACK, pause=pause, error=failure)
        LIVE_SEQUENCE.set(target.manifest.sequence)
        return self._record(name, SwapOutcome.SWAP_OUTCOME_LIVE, pause=pause)

    async def _replace(self, version: VerifiedVersion) -> None:
        """Pauses, drops the caches, loads and relabels. Leaves the engine paused. Safe to call again."""
        with SWAP_SECONDS.labels("pause").time():
            async with asyncio.timeout(self._swap_timeout):
                # "keep" freezes running requests; clearing the caches makes the engine prefill them again.
                await self.llm.pause_generation(mode="keep", clear_cache=True)
        with SWAP_SECONDS.labels("reload").time():
            async with asyncio.timeout(self._swap_timeout):
                await self.llm.collective_rpc("swap_weights", kwargs={"weights_path": str(version.path)})
                await self.llm.update_weight_version(version.manifest.version)

    def _record(self, version: str, outcome: SwapOutcome.ValueType, *, pause: float = 0.0, error: str = "") -> Swap:
        swap = Swap(version=version, outcome=outcome, pause_seconds=pause, error=error)
        swap.at.GetCurrentTime()
        self.swaps.append(swap)
        name = SwapOutcome.Name(outcome).removeprefix("SWAP_OUTCOME_").lower()
        SWAPS.labels(name).inc()
        log = logger.error if error else logger.info
        log("swap %s: %s", version, name, extra={"pause_seconds": round(pause, 3), "error": error})
        return swap

    async def check(self) -> None:
        """Raises `errors.Internal` when the engine has died."""
        try:
            await self.llm.check_health()
        except Exception as error:
            raise errors.Internal(f"The vLLM engine died: {error!r}.") from error

    async def watch(self, interval: float = 1.0) -> None:
        """Background task: raises as soon as the engine has died, so that the process ends and is restarted."""
        while True:
            await self.check()
            await asyncio.sleep(interval)

    async def close(self) -> None:
        """Ends the engine and its processes."""
        await asyncio.to_thread(self.llm.shutdown)


def tensor_table(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor in the folder's safetensors files, read from their headers alone."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        table.update((name, (entry["dtype"], tuple(entry["shape"]))) for name, entry in header.items())
    return table


def _tokenizer_hashes(version: VerifiedVersion) -> dict[str, str]:
    return {
        file.path: file.sha256
        for file in version.manifest.files
        if file.path.startswith(("tokenizer", "chat_template"))
    }


def check_compatible(live: VerifiedVersion, target: VerifiedVersion) -> None:
    """Raises `errors.CorruptCheckpoint` where `target` cannot take the place of `live` in a running engine."""
    have, want = tensor_table(target.path), tensor_table(live.path)
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
