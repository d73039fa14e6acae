"""What each part of the reward model's training is worth: with all of them, and without one at a time.

    make bench-reward-ablation DATA=pairs.jsonl.gz

The same pairs and settings as `bench-reward-model`; 300 are held out. Prints the table of `docs/reward.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.reward_data import Data, load, path_given
from bench.reward_model import OUTPUT, train
from trainer import calibration


def ours(shared: bool = True, **settings: Any) -> dict[str, Any]:
    """A job of ours with other settings."""
    return {"who": "ours", "shared": shared, "settings": settings}


VARIANTS: dict[str, dict[str, Any]] = {
    "all of it": ours(),
    "without length balancing": ours(length_balance=False),
    "without regularisation": ours(score_penalty=0.0),
    "without a shared prompt": ours(shared=False),
}


def measure(data: Data, name: str, variant: Mapping[str, Any], seed: int, epochs: int) -> dict[str, float]:
    """Trains one variant, and judges it."""
    result = train(data, {"ours": variant}, seed=seed, epochs=epochs, label=name, output=OUTPUT)["ours"]
    margins, longer = result.margins, np.array([float(pair.longer) for pair in data.heldout])
    ece, _ = calibration.cross_fitted_ece(margins)
    return {
        "accuracy": calibration.accuracy(margins),
        "length correlation": abs(calibration.correlation(margins, longer)),
        "ECE": ece,
        "spread of scores": float(result.scores.std()),
        "pairs/s": statistics.median(result.rates()),
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=600, help="pairs to learn from; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    data, found = load(path_given(), arguments.pairs), dict[str, dict[str, float]]()
    for name, variant in VARIANTS.items():
        found[name] = measure(data, name, variant, arguments.seed, arguments.epochs)
        if len(found) == 1:
            print(f"| | {' | '.join(found[name])} |\n|---|{'---|' * len(found[name])}", flush=True)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found[name].values())} |", flush=True)
    first = found["all of it"]
    ratios = {
        f"{key} {name}": round(row[key] / first[key], 4)
        for name, row in found.items()
        for key in ("accuracy", "length correlation", "pairs/s")
        if row is not first and first[key]
    }
    print(json.dumps({"bench": "reward-ablation", "ratios": ratios, "runs": 1}), flush=True)


if __name__ == "__main__":
    main()
