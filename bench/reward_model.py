"""The reward model beside TRL's RewardTrainer: how well it learns, how fast, and how much it owes to length.

    make bench-reward-model DATA=pairs.jsonl.gz            one seed, 600 pairs
    make bench-reward-model DATA=pairs.jsonl.gz FULL=1     three seeds, all pairs

Both start from the default model's body, and see the same tokens, pairs a step, epochs and learning rates: 5e-5, and
5e-4 for the head, which TRL is given an optimizer for; both fall to zero over the run, TRL's default. The former was
chosen on a fifth of the pairs to learn from, where both sides did better with it than with 2e-5. TRL has fp32 weights
and computes in bf16 (its default, and faster), but on processors without instructions for that. What else they do is
their own: TRL's head begins at random; here it begins at zero, lengths are balanced, scores are held near zero, and the
two responses of a pair share their prompt. 300 pairs, chosen by hash, are held out. Steps take turns.

What is trained is kept in `--output`, and what is there is not trained again: a run that was broken off goes on with
the seed that it was at, and one that `--only` named a side of with the other. Speeds are compared only where both took
turns. Remove the folder after a change of what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.reward_data import Data, load, path_given
from bench.reward_worker import Job
from trainer import calibration
from trainer.samples import to_fields

LEARNING_RATE = 5e-5
HEAD_LEARNING_RATE = 5e-4
BATCH_SIZE = 16
SIDES = ("ours", "trl")
SETTLED = 2
"""Steps that are not timed: memory is filled for the first time."""
WINDOW = 5
"""Steps that a ratio of speeds is taken over."""

Scores = calibration.Array


@dataclasses.dataclass
class Trained:
    """A worker's steps and scores."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    pairs: list[int] = dataclasses.field(default_factory=list)
    scores: Scores = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    run: str = ""
    """The same for those that took turns."""

    def rates(self) -> list[float]:
        """Pairs a second, by window."""
        starts = range(SETTLED, max(SETTLED + 1, len(self.seconds) - WINDOW + 1), WINDOW)
        return [sum(self.pairs[at : at + WINDOW]) / sum(self.seconds[at : at + WINDOW]) for at in starts]

    def to_json(self) -> dict[str, Any]:
        """As `of` takes it."""
        return {**dataclasses.asdict(self), "scores": self.scores.tolist()}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Trained:
        """From a file."""
        return cls(**{**found, "scores": np.array(found["scores"])})

    @property
    def margins(self) -> Scores:
        """[N] score of chosen less that of rejected."""
        found: Scores = self.scores[:, 0] - self.scores[:, 1]
        return found


class Worker:
    """A process that trains when told to."""

    def __init__(self, job: Job, folder: Path, name: str) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(dataclasses.asdict(job)))
        self._log = (folder / f"{name}.log").open("w+")
        self.result = Trained()
        self.running = True
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.reward_worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def turn(self) -> None:
        """One step; after the last one, scores."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self._hear()

    def finish(self) -> None:
        """Hears the scores."""
        while self.running:
            self._hear()
        self._process.wait(60)

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait(60)
        self._log.close()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("@"):
                continue
            told = json.loads(line[1:])
            if "scores" in told:
                self.result.scores, self.running = np.array(told["scores"]), False
            else:
                self.result.seconds.append(told["seconds"])
                self.result.pairs.append(told["pairs"])
            return
        self._log.seek(0)
        raise SystemExit(f"bench: a worker ended too early; its log ends:\n{self._log.read()[-2000:]}")


def train(
    data: Data,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    epochs: int,
    label: str,
    output: Path,
    learning_rate: float,
) -> dict[str, Trained]:
    """Trains all variants, a step of each in turn, and leaves them in the folder `output`; or takes them from there."""
    common: dict[str, Any] = {
        "base": str(data.base),
        "train": [to_fields(pair) for pair in data.train],
        "heldout": [to_fields(pair) for pair in data.heldout],
        "seed": seed,
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "learning_rate": learning_rate,
        "head_learning_rate": HEAD_LEARNING_RATE,
        "settings": {},
    }
    jobs = {name: Job(**{**common, **fields}) for name, fields in variants.items()}
    kept = {name: output / f"{_digest(job)}.json" for name, job in jobs.items()}
    results = {name: Trained.of(json.loads(path.read_text())) for name, path in kept.items() if path.exists()}
    missing = {name: job for name, job in jobs.items() if name not in results}
    if not missing:
        return results
    steps, run = epochs * -(-len(data.train) // BATCH_SIZE), uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for name, job in missing.items():
            workers[name] = Worker(job, Path(folder), name)
            stack.callback(workers[name].stop)
        for step in range(steps):
            for name, worker in list(workers.items())[:: -1 if step % 2 else 1]:
                harness.progress(f"{label}: step {step + 1} of {steps}, {name}", step / steps)
                worker.turn()
        harness.progress(f"{label}: scoring", 1.0)
        for worker in workers.values():
            worker.finish()
    output.mkdir(parents=True, exist_ok=True)
    for name, worker in workers.items():
        results[name] = dataclasses.replace(worker.result, run=run)
        kept[name].write_text(json.dumps(results[name].to_json()))
    return results


def took_turns(trained: Mapping[str, Trained]) -> bool:
    """Whether all of them did, together: only then can their speeds be compared."""
    return len({result.run for result in trained.values()}) == 1 < len(trained)


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps(dataclasses.asdict(job), sort_keys=True).encode()).hexdigest()[:16]


def mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4)


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """What is trained, and how; FULL=1 in the environment asks for all of it."""
    full = os.environ.get("FULL", "") not in ("", "0")
    parser.add_argument("--pairs", type=int, default=0 if full else 600, help="pairs to learn from; 0 for all")
    parser.add_argument("--seeds", type=int, default=3 if full else 1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of the body, on both sides")
    parser.add_argument("--output", type=Path, default=output, help="folder of what was trained")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `train` is told of them."""
    return {name: getattr(arguments, name) for name in ("epochs", "learning_rate", "output")}


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, Path("bench-out/reward-model"))
    parser.add_argument("--only", choices=SIDES, help="train this side alone; a run without it compares")
    arguments = parser.parse_args()
    data = load(path_given(), arguments.pairs)
    longer = np.array([float(pair.longer) for pair in data.heldout])
    speed = harness.Ratio("pairs_per_second_vs_trl", "pairs/s", harness.Target(least=2.0))
    found: dict[str, list[dict[str, float]]] = {who: [] for who in SIDES}
    for seed in range(arguments.seeds):
        variants = {who: {"who": who} for who in ([arguments.only] if arguments.only else SIDES)}
        trained = train(data, variants, seed=seed, label=f"seed {seed}", **settings_of(arguments))
        if took_turns(trained):
            for rates in zip(trained["ours"].rates(), trained["trl"].rates(), strict=True):
                speed.add(*rates)
        for name, result in trained.items():
            margins = result.margins
            right = int((margins > 0).sum())
            low, high = calibration.wilson(right, len(margins))
            ece, temperature = calibration.cross_fitted_ece(margins)
            measured = {
                "accuracy": calibration.accuracy(margins),
                "length_correlation": calibration.correlation(margins, longer),
                "ece_raw": calibration.ece(margins),
                "ece": ece,
                "temperature": temperature,
                "score_std": float(result.scores.std()),
            }
            found[name].append(measured)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in measured.items())
            print(f"seed {seed}  {name:<5} {shown}  (accuracy {low:.3f} to {high:.3f})", flush=True)
    if arguments.only:
        accuracy = mean([row["accuracy"] for row in found[arguments.only]])
        harness.report("reward-model", [], arguments.seeds, {f"accuracy_of_{arguments.only}_alone": accuracy})
        return
    ours, trl = ({key: mean([row[key] for row in rows]) for key in rows[0]} for rows in found.values())
    bias, peer_bias = (mean([abs(row["length_correlation"]) for row in rows]) for rows in found.values())
    also = {
        "accuracy_vs_trl": round(ours["accuracy"] / trl["accuracy"], 4),
        "accuracy": ours["accuracy"],
        "length_bias_vs_trl": round(bias / peer_bias, 4),
        "ece": ours["ece"],
    }
    print(
        f"\n{len(data.train)} pairs, {len(data.heldout)} held out, {arguments.seeds} seeds, {arguments.epochs} epochs"
    )
    print(f"trl: accuracy {trl['accuracy']}, |length correlation| {peer_bias}, ece {trl['ece']}; ours: {bias}")
    if not speed.ours:
        print("speeds are not compared: the two never took turns")
    harness.report("reward-model", [speed] if speed.ours else [], arguments.seeds, also)


if __name__ == "__main__":
    main()
