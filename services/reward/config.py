"""Settings of the reward service."""

from __future__ import annotations

from pydantic import Field

from services.config import EngineSettings
from thumbwheel.config import Address


class RewardSettings(EngineSettings):
    """Serves the reward model: scores responses, and swaps in new versions as they are announced."""

    listen: Address = "127.0.0.1:50052"
    """Address of the gRPC server; port 0 takes any free one."""

    reference: str = ""
    """Address of a policy server that serves the reference version; each prompt's response by it is asked for once, and
    scores are told over that of this response. Empty: only over the reference responses that callers bring."""

    reference_version: str = "policy-000000"
    """The version that it must serve."""

    reference_max_tokens: int = Field(default=256, ge=1)
    """Longest response of the reference, in tokens."""

    reference_capacity: int = Field(default=100_000, ge=1)
    """Prompts whose reference responses are kept on disk; those asked for longest ago are dropped."""

    metrics_port: int = Field(default=9102, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""
