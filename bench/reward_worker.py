"""A reward model in training, one optimizer step for each line on standard input. See `bench/reward_model.py`.

    python -m bench.reward_worker {"who": "ours" or "trl", …}

Says, a JSON object a line, how long each step took, and at the end the scores of the held-out pairs, computed alike for
both: `{"step": 3, "pairs": 16, "seconds": 4.2}`, `{"scores": [[chosen, rejected], …]}`. The two take turns, so whatever
else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import runtime
from trainer.samples import Pair, from_fields

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
TRL_MICRO_BATCH = {"cpu": 2, "cuda": 16}
"""Pairs. It pads both responses of all to the longest: on a CPU with 4 it takes 7 GB, and with more padding it is no
faster. On a GPU a step is one micro-batch on both sides.
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train."""

    who: str
    base: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    settings: dict[str, Any]
    """Of ours."""
    shared: bool = True
    """Whether the two responses of a pair share their prompt."""


class Turns:
    """Waits for its turn, and tells what it took."""

    def __init__(self) -> None:
        self._step = 0
        self._began = 0.0

    def wait(self) -> None:
        """Until the other side says so."""
        if not sys.stdin.readline():
            raise SystemExit(1)
        self._began = time.perf_counter()

    def done(self, pairs: int) -> None:
        """A step is."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._step += 1
        say({"step": self._step, "pairs": pairs, "seconds": time.perf_counter() - self._began})


def say(fields: dict[str, Any]) -> None:
    """One line to the other side."""
    print("@" + json.dumps(fields), flush=True)


def unshared(pair: Pair) -> Pair:
    """The pair with its prompt in front of both responses: computed twice, and the same in every other respect."""
    head, rest = pair.prompt[:1], pair.prompt[1:]
    return dataclasses.replace(pair, prompt=head, chosen=rest + pair.chosen, rejected=rest + pair.rejected)


def train_ours(job: Job, pairs: list[Pair], folder: Path, turns: Turns) -> None:
    """With Thumbwheel's learner."""
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses, publish
    from trainer.config import LearningSettings
    from trainer.learner import Learner, StepReport

    publish.write_scorer(Path(job.base), folder / "start")
    fields = {
        "micro_batch_tokens": MICRO_BATCH_TOKENS[runtime.device().type],
        "head_learning_rate": job.head_learning_rate,
        "learning_rate_decay": "linear",
        **job.settings,
    }
    settings = LearningSettings.model_validate(
        {"epochs": job.epochs, "batch_size": job.batch_size, "seed": job.seed, **fields}
    )
    objective = losses.objective("reward", ModelRole.MODEL_ROLE_REWARD, settings)
    learner = Learner(objective, folder / "start", settings, learning_rate=job.learning_rate)

    def on_step(report: StepReport) -> None:
        turns.done(report.samples)
        if report.step < report.steps:
            turns.wait()

    turns.wait()
    learner.learn(pairs if job.shared else list(map(unshared, pairs)), {}, round_number=1, on_step=on_step)
    learner.write_model(folder / "end")
    learner.close()


def train_trl(job: Job, pairs: list[Pair], folder: Path, turns: Turns) -> None:
    """With TRL's RewardTrainer, on the same tokens and at the same learning rates of body and head."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from trainer import kernels

    class Turned(TrainerCallback):  # type: ignore[misc]  # Transformers has no types here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(job.batch_size)

    device = runtime.device().type
    dataset = Dataset.from_list(
        [{"chosen_ids": [*pair.prompt, *pair.chosen], "rejected_ids": [*pair.prompt, *pair.rejected]} for pair in pairs]
    )
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=TRL_MICRO_BATCH[device],
        gradient_accumulation_steps=job.batch_size // TRL_MICRO_BATCH[device],
        num_train_epochs=job.epochs,
        learning_rate=job.learning_rate,
        seed=job.seed,
        bf16=device != "cpu" or kernels.multiplies_bf16(),
        gradient_checkpointing=False,  # slower, and there is memory enough
        use_cpu=device == "cpu",
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer = RewardTrainer(
        model=job.base,
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.base),
        callbacks=[Turned()],
    )
    head = list(trainer.model.score.parameters())
    body = [parameter for parameter in trainer.model.parameters() if all(parameter is not other for other in head)]
    groups: list[dict[str, Any]] = [{"params": body}, {"params": head, "lr": job.head_learning_rate}]
    # Its own has one rate for all; in every other respect this is its own.
    trainer.optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, weight_decay=0.0)
    trainer.train()
    trainer.model.save_pretrained(folder / "end")


TRAINERS: dict[str, Callable[[Job, list[Pair], Path, Turns], None]] = {"ours": train_ours, "trl": train_trl}


def main() -> None:
    """Trains, and scores."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    runtime.before_imports()
    if job.who == "ours":
        runtime.prepare(0)
    from trainer import judge

    train, heldout = ([p for f in given if isinstance(p := from_fields(f), Pair)] for given in (job.train, job.heldout))
    with tempfile.TemporaryDirectory() as folder:
        TRAINERS[job.who](job, train, Path(folder), Turns())
        judged = judge.judge_by(Path(folder) / "end", heldout, max_tokens=MICRO_BATCH_TOKENS[runtime.device().type])
    say({"scores": judged.scores[:, :, 0].tolist()})


if __name__ == "__main__":
    main()
