"""What the tasks of a process share: its settings, the stream, the store, and the learner that they take turns at."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thumbwheel.auth import ManifestSigner
from thumbwheel.checkpoints.store import LocalStore
from thumbwheel.stream.log import Log, Producer
from trainer.config import TrainerSettings

if TYPE_CHECKING:
    from trainer.team import Team


@dataclass(frozen=True)
class Shared:
    """What the tasks of a process share."""

    settings: TrainerSettings
    log: Log
    producer: Producer
    store: LocalStore
    signer: ManifestSigner
    stop: threading.Event

    @functools.cached_property
    def team(self) -> Team:
        """The ranks, and the learner that they have."""
        from trainer.team import Team

        return Team(self.settings, self.stop.is_set)
