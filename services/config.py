"""Settings that the services with a vLLM engine share."""

from __future__ import annotations

from pydantic import Field

from thumbwheel.config import ServerSettings


class EngineSettings(ServerSettings):
    """A process that serves a model with vLLM."""

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

    swap_timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest time for each step of a swap; past it the old weights are put back."""

    drain_seconds: float = Field(default=30.0, ge=0)
    """How long calls in flight may go on after SIGTERM."""
