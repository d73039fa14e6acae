"""The vLLM engine that policy and reward share: started on a verified version, watched, and ended."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any, Self

from services.config import EngineSettings
from services.probes import Probes
from services.swap import PauseMode, Swapper
from services.turnstile import Turnstile
from thumbwheel import errors
from thumbwheel.checkpoints.store import VerifiedVersion
from thumbwheel.v1.policy_pb2 import Swap

logger = logging.getLogger(__name__)


class Engine:
    """An `AsyncLLM` and the version it serves. Made by `start`; ended by `close`."""

    def __init__(self, llm: Any, version: VerifiedVersion, settings: EngineSettings, probes: Probes) -> None:
        self.llm = llm
        # Scores carry no version of their own, so calls that need one version throughout pass through here.
        self.turnstile = Turnstile()
        self._swapper = Swapper(llm, version, settings, self.turnstile, probes)
        self._suspect = ""

    @classmethod
    async def start(cls, version: VerifiedVersion, settings: EngineSettings, *, pooling: bool) -> Self:
        """Loads the version; `pooling` scores (a sequence classifier) rather than generates.

        Raises `errors.FailedPrecondition` where vLLM cannot serve it.
        """
        # Read by vLLM's CPU backend when its worker starts; a GPU build ignores them.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_threads_bind
        # How many streams a step's tokens go to before others have a turn in our event loop: a call that is turned away
        # is told so within milliseconds, also while a full batch is being handed out.
        os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "16")
        # We configure logging ourselves; vLLM's own lines stay on standard error.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        kwargs: dict[str, Any] = (
            {"runner": "pooling", "convert": "classify"} if pooling else {"scheduling_policy": "priority"}
        )
        if current_platform.is_cpu():
            from services.executor import RestingExecutor

            kwargs["distributed_executor_backend"] = RestingExecutor
            if pooling:
                # Candidates share their prompt by whole blocks: small ones share more of it than a CPU's usual 128.
                # What is taken from a cache rounds otherwise than what is computed, so engines that generate keep the
                # usual ones: the same seed is to give the same tokens.
                kwargs["block_size"] = 32
        args = AsyncEngineArgs(
            model=str(version.path),
            dtype=computing_dtype(on_cpu=current_platform.is_cpu()),
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
        try:
            await llm.collective_rpc("prepare")
            await llm.update_weight_version(version.manifest.version)
            probes = Probes(llm, settings, scores=pooling)
            suspect = False
            try:
                await probes.check(version)
            except errors.CorruptCheckpoint as error:
                # There is nothing to go back to yet: the follower looks for another version.
                suspect = True
                logger.error("%s", error)
        except BaseException:
            await asyncio.to_thread(llm.shutdown)
            raise
        logger.info("engine started", extra={"version": version.manifest.version})
        engine = cls(llm, version, settings, probes)
        engine._suspect = version.manifest.version if suspect else ""
        return engine

    @property
    def version(self) -> str:
        """Name of the version that new requests are served with."""
        return self.live.manifest.version

    @property
    def live(self) -> VerifiedVersion:
        """The version that new requests are served with, on the local disk."""
        return self._swapper.live

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the KV cache holds; None where the engine does not say."""
        cache = self.llm.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None

    @property
    def suspect(self) -> bool:
        """True where what is live is what the engine was started on, and did not reproduce its probe."""
        return self.version == self._suspect

    @property
    def previous(self) -> VerifiedVersion | None:
        """The version that `rollback` goes back to."""
        return self._swapper.previous

    @property
    def swaps(self) -> Sequence[Swap]:
        """The latest swaps, oldest first; the first is the version that this engine started with."""
        return self._swapper.swaps

    async def swap(self, target: VerifiedVersion, *, mode: PauseMode | None = None) -> Swap:
        """Serves `target` from now on. See `services.swap.Swapper.swap`."""
        return await self._swapper.swap(target, mode=mode)

    async def rollback(self) -> Swap:
        """Serves the version before. See `services.swap.Swapper.rollback`."""
        return await self._swapper.rollback()

    async def check(self) -> None:
        """Raises `errors.Internal` when the engine has died, or a swap has left it with weights of no version."""
        if self._swapper.broken is not None:
            raise self._swapper.broken
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
        if (handler := getattr(self.llm, "output_handler", None)) is not None:
            handler.cancel()  # it would report the end as a fault
        await asyncio.to_thread(self.llm.shutdown)


def computing_dtype(*, on_cpu: bool) -> str:
    """What vLLM is to compute in. Without instructions for bf16 a processor is many times slower in it than in fp32.
    Weights are the same numbers in either, and take twice the memory.
    """
    import torch

    return "float32" if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else "bfloat16"
