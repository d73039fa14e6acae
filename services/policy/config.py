"""Settings of the policy service."""

from __future__ import annotations

from pydantic import Field

from services.config import EngineSettings
from thumbwheel.config import Address


class PolicySettings(EngineSettings):
    """Serves the policy: generates text, records it, and swaps in new versions as they are announced."""

    listen: Address = "127.0.0.1:50051"
    """Address of the gRPC server; port 0 takes any free one."""

    metrics_port: int = Field(default=9101, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""

    max_tokens: int = Field(default=1024, ge=1)
    """Most response tokens a request may ask for."""

    recorder_capacity: int = Field(default=10_000, ge=1)
    """Generation events kept in memory until the broker has them."""
