"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.config import EngineSettings
from thumbwheel.config import Address, split_address


class PolicySettings(EngineSettings):
    """Serves the policy: generates text, records it, and swaps in new versions as they are announced."""

    listen: Address = "127.0.0.1:50051"
    """Address of the gRPC server; port 0 takes any free one."""

    metrics_port: int = Field(default=9101, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""

    max_tokens: int = Field(default=1024, ge=1)
    """Most response tokens a request may ask for."""

    coalesce_seconds: float = Field(default=0.0, ge=0, le=1)
    """Longest time that a piece of a stream is kept back, to be sent with those that follow; 0 sends each at once."""

    spool_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Bytes of generation events kept on disk, in `home`, for a broker that is away or loses what it held."""

    @property
    def bulk_slots(self) -> int:
        """Sequences that bulk generation may have running: a quarter of the engine's, so that people find room."""
        return max(1, self.max_num_seqs // 4)

    @property
    def spool_path(self) -> Path:
        """The spool of this server; several servers of one home have a port, and so a spool, each."""
        _, port = split_address(self.listen)
        return self.home / "spool" / f"policy-{port}.db"
