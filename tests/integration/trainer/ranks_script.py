"""What each rank does in `test_ranks.py`: for every ZeRO stage a run of two rounds, saved in between and resumed.

    torchrun --nproc-per-node N ranks_script.py MODEL FOLDER STAGE[,STAGE...] [CHECKPOINT]

FOLDER/stage-S/ gets `checkpoint`, `straight` and `resumed` (models), and `reports.json`. With CHECKPOINT it begins from
that after the first round, instead of learning it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from trainer import runtime


def run(model: Path, folder: Path, stage: int, checkpoint: Path | None) -> None:
    """One stage."""
    from tests.unit.trainer.samples import make_samples, with_sums
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses, ranks
    from trainer.config import TrainerSettings
    from trainer.learner import Learner

    settings = TrainerSettings.model_validate(
        {"batch_size": 6, "micro_batch_tokens": 80, "beta": 0.5, "zero_stage": stage, "warmup_steps": 3}
    )
    objective = losses.objective("dpo", ModelRole.MODEL_ROLE_POLICY, settings)
    # Everybody has to make the same ids.
    samples = [dataclasses.replace(sample, id=f"sample-{n:03d}") for n, sample in enumerate(make_samples(30))]
    reference = with_sums(samples, -40.0, -42.0)

    def learner(steps_done: int = 0) -> Learner:
        return Learner(objective, model, settings, learning_rate=1e-3, steps_done=steps_done)

    def round_(number: int, of: Learner) -> None:
        part = samples[:18] if number == 1 else samples[18:]
        of.learn(part, reference, round_number=number, on_step=lambda report: reports.append(report.numbers()))

    reports: list[dict[str, float]] = []
    made = folder / f"stage-{stage}"
    if ranks.lead():
        (made / "checkpoint").mkdir(parents=True)
    ranks.gather(None)
    if checkpoint is None:
        straight = learner()
        round_(1, straight)
        # Written while the next round is learnt.
        straight.save(made / "checkpoint")
        round_(2, straight)
        straight.saver.wait()
        ranks.gather(None)
        straight.write_model(made / "straight")
        straight.close()
    resumed = learner(steps_done=3)
    resumed.restore(checkpoint or made / "checkpoint")
    round_(2, resumed)
    resumed.write_model(made / "resumed")
    resumed.close()
    if ranks.lead():
        (made / "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    runtime.before_imports()
    runtime.prepare(1)
    for one in sys.argv[3].split(","):
        run(Path(sys.argv[1]), Path(sys.argv[2]), int(one), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
