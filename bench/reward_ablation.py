"""What each part of the reward model's training is worth: with all of them, and without one at a time.

    make bench-reward-ablation DATA=pairs.jsonl.gz                 one seed, 600 pairs
    make bench-reward-ablation DATA=pairs.jsonl.gz FULL=1          three seeds, all pairs

The same pairs and settings as `bench-reward-model`; 300 are held out. All variants take turns, step by step, so that
their speeds can be compared; a seed that was finished is kept, and not trained again. Prints the table of
`docs/reward.md`: means over the seeds, and of the speeds the medians.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.reward_data import Data, load, path_given
from bench.reward_model import Trained, add_arguments, mean, settings_of, took_turns, train
from trainer import calibration


def ours(shared: bool = True, **settings: Any) -> dict[str, Any]:
    """A job of ours with other settings."""
    return {"who": "ours", "shared": shared, "settings": settings}


ALL = "all of it"
VARIANTS: dict[str, dict[str, Any]] = {
    ALL: ours(),
    "without length balancing": ours(length_balance=False),
    "without regularisation": ours(score_penalty=0.0),
    "without a shared prompt": ours(shared=False),
}


def measure(data: Data, trained: Trained) -> dict[str, float]:
    """What the held-out pairs say of it."""
    margins, longer = trained.margins, np.array([float(pair.longer) for pair in data.heldout])
    ece, _ = calibration.cross_fitted_ece(margins)
    return {
        "accuracy": calibration.accuracy(margins),
        "length correlation": abs(calibration.correlation(margins, longer)),
        "ECE": ece,
        "spread of scores": float(trained.scores.std()),
        "pairs/s": statistics.median(trained.rates()),
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, Path("bench-out/reward-ablation"))
    arguments = parser.parse_args()
    data = load(path_given(), arguments.pairs)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    speeds = {name: harness.Ratio(f"pairs/s {name}", "pairs/s") for name in VARIANTS if name != ALL}
    for seed in range(arguments.seeds):
        trained = train(data, VARIANTS, seed=seed, label=f"seed {seed}", **settings_of(arguments))
        for name, result in trained.items():
            rows[name].append(measure(data, result))
        for name, speed in speeds.items() if took_turns(trained) else ():
            for rates in zip(trained[name].rates(), trained[ALL].rates(), strict=True):
                speed.add(*rates)
    means = {name: {key: mean([row[key] for row in found]) for key in found[0]} for name, found in rows.items()}
    print(f"| | {' | '.join(means[ALL])} |\n|---|{'---|' * len(means[ALL])}")
    for name, found in means.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found.values())} |")
    also = {
        f"{key} {name}": round(means[name][key] / means[ALL][key], 4)
        for name in speeds
        for key in ("accuracy", "length correlation")
        if means[ALL][key]
    }
    harness.report("reward-ablation", [one for one in speeds.values() if one.ours], arguments.seeds, also)


if __name__ == "__main__":
    main()
