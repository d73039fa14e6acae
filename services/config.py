"""Settings that the services with a vLLM engine share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from thumbwheel.config import ServerSettings


class SwapSettings(ServerSettings):
    """How new weights come into a running engine. See docs/swaps.md."""

    swap_mode: Literal["keep", "wait", "abort"] = "keep"
    """What a swap does with requests in flight: keep freezes them and goes on with the new weights, wait lets them end
    first, abort ends them with what they have."""

    swap_fetch_seconds: float = Field(default=300.0, gt=0)
    """Longest time to bring a version from the store to the local disk; serving goes on meanwhile."""

    swap_verify_seconds: float = Field(default=120.0, gt=0)
    """Longest time to check a version's tensors; serving goes on meanwhile."""

    swap_wait_seconds: float = Field(default=60.0, gt=0)
    """Longest time to wait for requests that must end before a swap; past it the swap is tried again later."""

    swap_pause_seconds: float = Field(default=15.0, gt=0)
    """Longest time for the engine to pause."""

    swap_load_seconds: float = Field(default=60.0, gt=0)
    """Longest time to load the new weights; past it serving goes on with the old ones."""

    swap_probe_seconds: float = Field(default=15.0, gt=0)
    """Longest time to probe the new weights; past it the old ones are put back."""

    swap_restore_seconds: float = Field(default=180.0, gt=0)
    """Longest time to put the old weights back; past it the process ends, to be started again."""

    swap_resume_seconds: float = Field(default=15.0, gt=0)
    """Longest time for the engine to resume; past it the process ends, to be started again."""

    probe_logprob_tolerance: float = Field(default=0.5, gt=0)
    """Most that a log-probability of a policy's probe may differ from what the trainer published."""

    probe_score_tolerance: float = Field(default=0.25, gt=0)
    """Most that the score of a reward model's probe may differ from what the trainer published."""


class EngineSettings(SwapSettings):
    """A process that serves a model with vLLM."""

    serve_version: str = ""
    """Serve this version for good, as a reference does; empty: the newest that verifies, and those announced later."""

    max_model_len: int = Field(default=2048, ge=32)
    """Longest prompt plus response, in tokens."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences in one engine step."""

    max_in_flight: int = Field(default=512, ge=1)
    """Calls handled at once; more are told to retry."""

    max_queue_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Longest time that a call may be expected to wait for its turn; where it would be longer, it is told to retry."""

    kv_cache_gib: int = Field(default=1, ge=1)
    """KV cache of vLLM's CPU backend, in GiB."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine is spread over."""

    cpu_threads_bind: str = "auto"
    """Cores of vLLM's CPU backend, such as "0-1"; "auto" leaves one core free."""

    drain_seconds: float = Field(default=30.0, ge=0)
    """How long calls in flight may go on after SIGTERM."""

    def held_path(self, process: str) -> Path:
        """Folder of the versions that this process holds on its own disk."""
        return self.home / "held" / process
