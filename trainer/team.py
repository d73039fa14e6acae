"""The learner of a task on all ranks: rank 0 says what is to be done, and every rank does it, itself included.

    rank 0        task ─▶ team.reference · open · learn · save · probe · close
    the others    team.follow, until rank 0 ends

What the ranks are told is JSON. Rank 0 is heard from at least every `IDLE_SECONDS`, so that a lost one is noticed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import losses, ranks, runtime, samples
from trainer.background import Background
from trainer.config import TaskName, TrainerSettings
from trainer.guards import Unfit
from trainer.inference import Reference, stays
from trainer.judge import Judged
from trainer.learner import Learner, StepReport
from trainer.losses.base import PerSample
from trainer.samples import Pair, Sample

IDLE_SECONDS = 60.0


class Team:
    """Of one process; rank 0 calls the methods, the others follow. `stop` says that the process is to end."""

    def __init__(self, settings: TrainerSettings, stop: Callable[[], bool]) -> None:
        self._settings, self._stop = settings, stop
        self._learner: Learner | None = None
        self._reference: PerSample = {}
        self._asked = Reference(keep=stays(settings))
        self._said_at = time.monotonic()
        self._alone = False

    def reference(
        self, path: Path, wanted: Sequence[Sample], known: Mapping[str, Sequence[float]] | None = None
    ) -> PerSample:
        """Works out the reference's log-probabilities, for the next `learn`, which has those that are `known` as well.
        Returns all. Raises `Stopped`.
        """
        self._say("reference", path=str(path), wanted=wanted, known=known)
        budget = runtime.pass_tokens(self._settings.micro_batch_tokens)
        with self._stopping():
            found = self._asked.logprobs(path, wanted, max_tokens=budget, stop=self._stop) if wanted else {}
        self._reference = {id: torch.tensor(values) for id, values in (known or {}).items()} | found
        return self._reference

    def open(self, task: TaskName, start: Path, *, steps_done: int, checkpoint: Path | None) -> None:
        """Makes a task's learner of the model in `start`, as a training checkpoint left it."""
        self._say(
            "open",
            task=task,
            start=str(start),
            steps_done=steps_done,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )
        settings = self._settings
        role = losses.role_of(settings.objective(task))
        self._learner = Learner(
            losses.objective(settings.objective(task), role, settings, field=f"{task}_objective"),
            start,
            settings,
            learning_rate=settings.learning_rate(task),
            steps_done=steps_done,
        )
        if checkpoint is not None:
            self._learner.restore(checkpoint)

    def learn(
        self,
        wanted: Sequence[Sample],
        *,
        round_number: int,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> dict[str, float]:
        """See `Learner.learn`; with the reference that was worked out last."""
        self._say("learn", wanted=wanted, round_number=round_number)
        reference, self._reference = self._reference, {}
        with self._stopping():
            return self.learner.learn(wanted, reference, round_number=round_number, stop=self._stop, on_step=on_step)

    def judge(self, wanted: Sequence[Sample]) -> Judged:
        """See `Learner.judge`; of the pairs among `wanted`. Raises `Stopped`."""
        self._say("judge", wanted=wanted)
        with self._stopping():
            return self.learner.judge([sample for sample in wanted if isinstance(sample, Pair)], self._stop)

    def save(self, folder: Path, model: Path, grace: float = 0.0) -> Background:
        """See `Learner.save`."""
        self._say("save", folder=str(folder), model=str(model), grace=grace)
        return self.learner.save(folder, model, grace=grace)

    def hurry(self) -> None:
        """See `saving.Saver.hurry`; on this rank: the others end theirs by themselves."""
        if self._learner is not None:
            self._learner.saver.hurry()

    def probe(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """See `Learner.probe`."""
        self._say("probe", prompt=list(prompt), continuation=list(continuation))
        return self.learner.probe(prompt, continuation)

    def probe_score(self, tokens: Sequence[int]) -> float:
        """See `Learner.probe_score`."""
        self._say("probe_score", tokens=list(tokens))
        return self.learner.probe_score(tokens)

    def close(self) -> None:
        """Frees the learner, where there is one, and what it is compared with."""
        self._asked.close()
        if self._learner is not None:
            self._say("close")
            learner, self._learner = self._learner, None
            learner.close()

    def idle(self) -> None:
        """Is heard of, where nothing was to be said for some time."""
        if time.monotonic() - self._said_at >= IDLE_SECONDS:
            self._say("idle")

    def end(self) -> None:
        """Lets the others go."""
        self._say("end")

    @property
    def is_open(self) -> bool:
        """Whether there is a learner."""
        return self._learner is not None

    @property
    def learner(self) -> Learner:
        """This rank's part of it."""
        assert self._learner is not None, "it is opened first"
        return self._learner

    def follow(self) -> None:
        """Does what rank 0 does, until it ends. Raises `Stopped`."""
        while (told := ranks.from_lead())["do"] != "end":
            arguments = told["with"]
            for name in ("start", "path", "checkpoint", "folder", "model"):
                if arguments.get(name) is not None:
                    arguments[name] = Path(arguments[name])
            if "wanted" in arguments:
                arguments["wanted"] = [samples.from_fields(fields) for fields in arguments["wanted"]]
            with contextlib.suppress(Unfit):  # rank 0 has it as well, and says what is to be done
                getattr(self, told["do"])(**arguments)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Where all ranks stop within a round, nobody listens any more."""
        try:
            yield
        except runtime.Stopped:
            self._alone = True
            raise

    def _say(self, do: str, **arguments: Any) -> None:
        if ranks.count() > 1 and ranks.lead() and not self._alone:
            if "wanted" in arguments:
                arguments["wanted"] = [samples.to_fields(sample) for sample in arguments["wanted"]]
            ranks.from_lead({"do": do, "with": arguments})
            self._said_at = time.monotonic()
