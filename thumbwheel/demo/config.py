"""Settings of the demo."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from thumbwheel.stack import StackSettings


class DemoSettings(StackSettings):
    """Starts a whole deployment and simulated users, and shows how their preferences change the model's behaviour."""

    home: Path = Path("demo-out/home")
    """Folder of the demo's deployment; emptied at the start."""

    out: Path = Path("demo-out")
    """Where the plot and the figures are saved."""

    base_port: int = Field(default=22050, ge=1024, le=65000)
    """The parts listen on ports above it, which are below those that Linux gives to clients."""

    preference: str = "concise"
    """What the users prefer; `thumbwheel demo --list` names them all."""

    list: bool = False
    """Only list the preferences."""

    seed: int = 0
    """Decides who asks what, and which candidate is shown first."""

    versions: int = Field(default=3, ge=1)
    """The wheel turns until so many new policy versions have gone live."""

    comparisons_per_version: int = Field(default=56, ge=8)
    """Comparisons that a version is trained on."""

    questions: int = Field(default=96, ge=1, le=96)
    """Held-out questions that every version is measured by."""

    concurrency: int = Field(default=24, ge=1)
    """Users asking at the same time."""

    max_tokens: int = Field(default=96, ge=8)
    """Longest answer, in tokens."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Learning rate of policy and reward model: larger than usual, to see an effect within minutes."""

    deadline_minutes: float = Field(default=90.0, gt=0)
    """The demo gives up after so long."""

    keep: bool = False
    """Keep the deployment's state (several GB) when it ends; logs are always kept."""
