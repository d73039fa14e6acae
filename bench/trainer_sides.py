"""The sides of `bench/trainer.py`: ours, TRL, bare PyTorch. Each is a process of its own that works when it is told to.

    python -m bench.trainer_sides SIDE SETUP

SETUP is a JSON file: the model, the samples, where commands come from and answers go to. A command is the numbers of
the samples of a round; the answer says how long it took, and the peak memory of the process so far.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer import runtime

BATCH_SIZE = 8
"""Pairs, or rollouts, an optimizer step."""
ROLLOUTS = 4
"""Of a prompt."""
BETA = 0.1
KL_WEIGHT = 0.05
RATE = 1e-6
MAX_LENGTH = 512


class Commands:
    """What this side is told, and what it answers."""

    def __init__(self, setup: dict[str, Any], side: str) -> None:
        from trainer import samples

        self.model = Path(setup["model"])
        self.samples = [samples.from_fields(fields) for fields in setup["samples"]]
        self._commands = Path(setup["folder"], f"{side}.commands")
        self._answers = Path(setup["folder"], f"{side}.answers")
        self._began = 0.0

    def rounds(self) -> Iterator[list[Any]]:
        """The samples of each round; the next is asked for when the one before is answered."""
        self._say({})
        with self._commands.open() as lines:
            for line in lines:
                numbers = json.loads(line)
                if numbers is None:
                    return
                self._began = time.perf_counter()
                yield [self.samples[number] for number in numbers]

    def done(self, **more: float) -> None:
        """The round is done."""
        self._say({"seconds": time.perf_counter() - self._began, "memory": _peak_bytes(), **more})

    def _say(self, answer: dict[str, float]) -> None:
        with self._answers.open("w") as file:
            file.write(json.dumps(answer) + "\n")


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise AssertionError("VmHWM is missing")


def _settings(objective: str, **changes: Any) -> Any:
    from trainer.config import TrainerSettings

    size = BATCH_SIZE if objective == "dpo" else BATCH_SIZE // ROLLOUTS
    return TrainerSettings.model_validate(
        {"batch_size": size, "max_length": MAX_LENGTH, "beta": BETA, "kl_weight": KL_WEIGHT, **changes}
    )


def ours(commands: Commands, objective: str, **changes: Any) -> None:
    """Our learner, with the reference's log-probabilities of each round. Several ranks do the same together."""
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses, ranks
    from trainer.inference import Reference, stays
    from trainer.learner import Learner

    settings = _settings(objective, **changes)
    mixture = losses.objective(objective, ModelRole.MODEL_ROLE_POLICY, settings)
    learner = Learner(mixture, commands.model, settings, learning_rate=RATE)
    asked = Reference(keep=stays(settings))
    rounds = commands.rounds() if ranks.lead() else iter(())
    number = 0
    while True:
        samples = next(rounds, None) if ranks.lead() else None
        numbers = ranks.from_lead(None if samples is None else [commands.samples.index(s) for s in samples])
        if numbers is None:
            break
        number += 1
        mine = [commands.samples[index] for index in numbers]
        reference = asked.logprobs(commands.model, mine, max_tokens=runtime.pass_tokens(settings.micro_batch_tokens))
        learner.learn(mine, reference, round_number=number)
        if ranks.lead():
            commands.done()
    learner.close()


class _Timed(threading.Event):
    """An event that knows how long it was waited for."""

    waited = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        began = time.perf_counter()
        found = super().wait(timeout)
        self.waited += time.perf_counter() - began
        return found


def checkpoints(commands: Commands) -> None:
    """A round without saving, then one during which a checkpoint is written: how long the latter keeps learning up."""
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses
    from trainer.inference import reference_logprobs
    from trainer.learner import Learner

    settings = _settings("dpo")
    mixture = losses.objective("dpo", ModelRole.MODEL_ROLE_POLICY, settings)
    learner = Learner(mixture, commands.model, settings, learning_rate=RATE)
    captured = learner.saver.captured = _Timed()
    captured.set()
    budget = runtime.pass_tokens(settings.micro_batch_tokens)
    for number, samples in enumerate(commands.rounds(), 1):
        reference = reference_logprobs(commands.model, samples, max_tokens=budget)
        took: list[float] = []

        def learn(
            round_number: int, took: list[float] = took, samples: Any = samples, reference: Any = reference
        ) -> None:
            began = time.perf_counter()
            learner.learn(samples, reference, round_number=round_number)
            took.append(time.perf_counter() - began)

        learn(2 * number)
        with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
            captured.waited, began = 0.0, time.perf_counter()
            learner.save(Path(folder))
            called = time.perf_counter() - began
            learn(2 * number + 1)
            learner.saver.wait()
        commands.done(stall=called + captured.waited, step=took[0], saving_step=took[1])
    learner.close()


SIDES: dict[str, Callable[[Commands], None]] = {
    "ours-dpo": lambda commands: ours(commands, "dpo"),
    "ours-grpo": lambda commands: ours(commands, "grpo"),
    "ours-ppo": lambda commands: ours(commands, "ppo"),
    "one-rank": lambda commands: ours(commands, "dpo"),
    "two-ranks": lambda commands: ours(commands, "dpo", zero_stage=2),
    "checkpoints": checkpoints,
}
"""By their names; `trainer_peers` has the others."""


def main(side: str, setup: Path) -> None:
    """The process."""
    logging.basicConfig(level=logging.ERROR)
    runtime.before_imports()
    if not side.startswith("trl"):  # it comes as its users have it
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        runtime.prepare(max(1, (os.cpu_count() or 1) // local))
    work: Sequence[Callable[[Commands], None]]
    if side in SIDES:
        work = [SIDES[side]]
    else:
        from bench import trainer_peers

        work = [trainer_peers.SIDES[side]]
    for one in work:
        one(Commands(json.loads(setup.read_text()), side))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
