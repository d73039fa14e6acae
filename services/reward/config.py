"""Settings of the reward service."""

from __future__ import annotations

from pydantic import Field

from services.config import EngineSettings
from thumbwheel.config import Address


class RewardSettings(EngineSettings):
    """Serves the reward model: scores responses, and swaps in new versions as they are announced."""

    listen: Address = "127.0.0.1:50052"
    """Address of the gRPC server; port 0 takes any free one."""

    metrics_port: int = Field(default=9102, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""
