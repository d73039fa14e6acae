"""Settings of `thumbwheel reward init` and `thumbwheel reward report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from platformdirs import user_data_path
from pydantic import Field

from thumbwheel.config import CommandSettings
from trainer.config import LearningSettings


class InitSettings(LearningSettings):
    """Trains the first reward model of a deployment from a file of preferences, and publishes it.

    The file is what `thumbwheel export` writes, or HH-RLHF, or any form of TRL's preference data, gzipped or not. It
    begins from the base model, which is also version 0. A part of the pairs is held out, by a hash of the prompt; on
    those it is judged as it goes, and it stops when it gets no better. The version goes live at the next start of the
    trainer.
    """

    data: Path
    """The file, one JSON object a line."""

    home: Path = Field(default_factory=lambda: user_data_path("thumbwheel"))
    """Folder with the deployment's state."""

    base_model: str = ""
    """Model to begin from, where there is no version 0 yet: a folder or a Hugging Face id; empty: the default model."""

    limit: int = Field(default=0, ge=0)
    """Read only so many lines; 0 reads all."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Learning rate of the body."""

    learning_rate_decay: Literal["none", "linear"] = "linear"
    """Whether the learning rate falls to zero over the run."""

    head_learning_rate: float = Field(default=5e-4, ge=0)
    """Learning rate of the heads, which begin at zero; 0 is that of the body."""

    batch_size: int = Field(default=16, ge=1)
    """Pairs an optimizer step, at the most."""

    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts whose pairs are held out."""

    evaluations: int = Field(default=4, ge=1)
    """How often an epoch it is judged on them."""

    patience: int = Field(default=3, ge=1)
    """It stops when so many judgements in a row were no better than the best before; the best is published."""

    curves: Path | None = None
    """Picture of losses and accuracy, step by step; left out: in the home, named after the version."""


class ReportSettings(CommandSettings):
    """Writes one page on a reward version: how right it is, how calibrated, and what it owes to length."""

    version: str
    """The version, such as `reward-000001`."""

    home: Path = Field(default_factory=lambda: user_data_path("thumbwheel"))
    """Folder with the deployment's state."""

    data: Path
    """File of pairs to judge it on; those that it learnt from are left out."""

    output: Path | None = None
    """The page; left out: named after the version, in the present folder."""

    limit: int = Field(default=2000, ge=1)
    """Most pairs to judge it on."""

    max_length: int = Field(default=1024, ge=8)
    """Most tokens of a prompt and one response. Prompts lose their beginning."""

    micro_batch_tokens: int = Field(default=0, ge=0)
    """Tokens that one pass takes, padding included; 0 takes what suits the device: 1,024 on a CPU, 4,096 on a GPU."""

    threads: int = Field(default=0, ge=0)
    """Threads to compute with; 0 leaves it to OMP_NUM_THREADS, or else to the number of cores."""

    json_output: bool = False
    """Print the figures as JSON, too."""
