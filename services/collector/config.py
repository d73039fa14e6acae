"""Settings of the collector."""

from __future__ import annotations

from pydantic import Field

from thumbwheel.config import Address, ServerSettings


class CollectorSettings(ServerSettings):
    """Records what users say of responses, and emits comparisons for training."""

    listen: Address = "127.0.0.1:50053"
    """Address of the gRPC server; port 0 takes any free one."""

    metrics_port: int = Field(default=9103, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""

    database: str = ""
    """SQLAlchemy URL of the database, such as postgresql+psycopg://host/thumbwheel; empty: collector.db in `home`."""

    max_text_bytes: int = Field(default=65_536, ge=1, le=262_144)
    """Longest edit or comment, in bytes of UTF-8."""

    max_pending_writes: int = Field(default=4_096, ge=1)
    """Submissions that may wait for the database; more are refused until some are durable."""

    write_timeout_seconds: float = Field(default=15.0, gt=0)
    """Longest that a call waits for the database."""

    publish_batch: int = Field(default=2_000, ge=1, le=10_000)
    """Most events that are read from the outbox at once."""

    poll_seconds: float = Field(default=1.0, gt=0)
    """Longest that a read of the stream waits for records."""

    loss_check_seconds: float = Field(default=2.0, gt=0)
    """While there is nothing to publish, how often to look whether the broker has lost its topics."""

    max_backoff_seconds: float = Field(default=5.0, gt=0)
    """Longest pause between two attempts to reach the broker, or to write to a full disk."""

    drain_seconds: float = Field(default=10.0, ge=0)
    """How long calls in flight may take to end after SIGTERM."""

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database or f"sqlite:///{self.home / 'collector.db'}"
