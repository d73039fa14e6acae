"""Settings of the collector."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from services.collector.curation.settings import CurationSettings
from services.collector.rules import Rules, Shares
from thumbwheel.config import Address, ServerSettings


class CollectorSettings(ServerSettings):
    """Records what users say of responses, and emits comparisons for training."""

    listen: Address = "127.0.0.1:50053"
    """Address of the gRPC server; port 0 takes any free one."""

    control_listen: Address = "127.0.0.1:50063"
    """Address of the control plane, where Forget is answered, and nowhere else; port 0 takes any free one."""

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

    assess_seconds: float = Field(default=300.0, gt=0)
    """How often the reliability of all raters is assessed anew."""

    learn_from_cut: bool = False
    """Whether a response that reached its greatest length may be the better one of a comparison to learn from."""

    curation: CurationSettings = Field(default_factory=CurationSettings)
    """How much one user may count, and what is too much to be chance."""

    reward: str = ""
    """Address of the reward service, which NextComparison asks what it is unsure of; empty: it is not asked."""

    policies: str = ""
    """Addresses of all policy servers, "host:port", separated by commas: Forget erases what they still keep on their
    disks. Empty: none are asked."""

    pick_random_share: float = Field(default=0.2, gt=0, le=1)
    """Share of NextComparison's picks that are made by chance alone, for unbiased measurement."""

    pick_duel_share: float = Field(default=0.4, ge=0, le=1)
    """Share of its picks that set two policy versions against each other; the rest is what the reward model is unsure
    of."""

    pick_window: int = Field(default=2_000, ge=2)
    """As many of a tenant's newest responses are picked from."""

    publish_batch: int = Field(default=2_000, ge=1, le=10_000)
    """Most events that are read from the outbox at once."""

    poll_seconds: float = Field(default=1.0, gt=0)
    """Longest that a read of the stream waits for records."""

    loss_check_seconds: float = Field(default=2.0, gt=0)
    """While there is nothing to publish, how often to look whether the broker has lost its topics."""

    max_backoff_seconds: float = Field(default=2.0, gt=0)
    """Longest pause between two attempts to reach the broker, or to write to a full disk."""

    tenants: Path | None = None
    """TOML file with each tenant's consent, retention and redaction; left out: tenants.toml in `home`, if there."""

    stream_retention_days: float = Field(default=14.0, ge=0)
    """Longest that the broker keeps a record: the topics' retention.ms plus segment.ms, a week each by default."""

    erase_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a call of Forget may wait until nothing is left on the disk."""

    drain_seconds: float = Field(default=10.0, ge=0)
    """How long calls in flight may take to end after SIGTERM."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.pick_random_share + self.pick_duel_share > 1:
            raise ValueError("--pick-random-share and --pick-duel-share are more than 1 together")
        return self

    @property
    def rules(self) -> Rules:
        """By what feedback is judged."""
        return Rules(self.curation, self.learn_from_cut)

    @property
    def shares(self) -> Shares:
        """How often each way of picking picks."""
        return Shares(self.pick_random_share, self.pick_duel_share)

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database or f"sqlite:///{self.home / 'collector.db'}"

    @property
    def tenants_path(self) -> Path | None:
        """The tenants file, if there is one."""
        beside = self.home / "tenants.toml"
        return self.tenants or (beside if beside.exists() else None)
