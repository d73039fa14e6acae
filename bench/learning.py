"""make bench-learning: what each objective learns, beside TRL's, and online with simulated users.

Two kinds of runs, on SmolLM2-135M-Instruct and the simulated users of the demo ("concise"):

    offline    the same pairs, thumbs or rollouts, seed and steps by us and by TRL; judged on held-out preferences: the
               share of held-out pairs whose better response gained more probability than the worse
    online     round after round, the policy answers, users judge or score, it learns; judged on held-out prompts: how
               often its answer wins against the one of the model that it began from, beside KL, reward and length

Online runs are of the learner and the objectives that the live trainer has; responses are drawn in the process, since
two engines beside it leave no room on two cores. Each run is a process, and leaves a JSON file in `--output`; one that
is there is not run again. `--only dpo,ppo` chooses; `--rounds` and the like make it longer. One ends before its last
round where a version is further from the start than `MAX_KL`; as with the live trainer's guard, the one before counts.
At the end a picture and a line of JSON are made of all the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness import progress

KL_WEIGHT = 0.05
"""Of the KL to the reference, where an objective has it."""

MAX_KL = 10.0
"""Nats a response from the start, beyond which a run ends: the live trainer's `--max-kl` keeps such a version back."""

ONLINE = {
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "ppo": ("ppo", {"kl_weight": KL_WEIGHT}),
    "grpo": ("grpo", {"kl_weight": KL_WEIGHT}),
    "rloo": ("rloo", {"kl_weight": KL_WEIGHT}),
    "dpo_sft": ("dpo+4*sft", {}),
    "ppo_without_baseline": ("ppo", {"kl_weight": KL_WEIGHT, "reference_baseline": False}),
}
"""Online runs: the objective, and settings of the learner."""

OFFLINE = ("dpo", "ipo", "kto", "grpo", "rloo")
"""Objectives that are run offline, each by us and by TRL."""


def jobs() -> list[str]:
    """All runs, the shortest first."""
    offline = [f"offline_{name}_{side}" for name in OFFLINE for side in ("ours", "trl")]
    return [*offline, *(f"online_{name}" for name in ONLINE)]


def main() -> None:
    """Runs what is missing, and reports."""
    parser = argparse.ArgumentParser(prog="make bench-learning", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench-out/learning"), help="folder of the runs")
    parser.add_argument("--only", default="", help="runs or objectives, separated by commas; left out: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of an online run")
    parser.add_argument("--prompts", type=int, default=28, help="prompts a round")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of an offline run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="a Hugging Face id or a folder; left out: the default model")
    parser.add_argument("--report", action="store_true", help="only report on the runs that are there")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = [part.strip() for part in options.only.split(",") if part.strip()]
    chosen = [job for job in jobs() if not wanted or any(part in (job, job.split("_", 1)[1]) for part in wanted)]
    missing = [] if options.report else [job for job in chosen if not (options.output / f"{job}.json").exists()]
    for number, job in enumerate(missing):
        progress(job, number / len(missing))
        arguments = {
            name: str(getattr(options, name)) for name in ("output", "rounds", "prompts", "pairs", "seed", "model")
        }
        flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        log = options.output / f"{job}.log"
        with log.open("w") as out:
            command = [sys.executable, "-m", "bench.learning_run", job, *flags]
            done = subprocess.run(
                command, stdout=out, stderr=out, check=False, env={**os.environ, "DS_ACCELERATOR": "cpu"}
            )
        if done.returncode:
            sys.exit(f"{job} failed: see {log}")
    progress("", 1.0)
    report(options.output)


def report(folder: Path) -> None:
    """Table, picture and closing line, of the runs in a folder."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("o*line_*.json"))}
    ratios: dict[str, float] = {}
    for name in OFFLINE:
        ours, trl = runs.get(f"offline_{name}_ours"), runs.get(f"offline_{name}_trl")
        if ours and trl:
            noise = math.sqrt(sum(one["accuracy"] * (1 - one["accuracy"]) / one["held_out"] for one in (ours, trl)))
            ratios[f"{name}_vs_trl"] = round(ours["accuracy"] / trl["accuracy"], 3) if trl["accuracy"] else math.nan
            print(
                f"offline {name:<6} held-out preferences won: ours {ours['accuracy']:.3f}, TRL {trl['accuracy']:.3f}, "
                f"before {ours['accuracy_before']:.3f}, one standard error of the difference {noise:.3f}"
            )
    print(f"\n{'online':<22}{'win rate':>18}{'KL':>8}{'reward':>16}{'tokens':>14}{'instruction loss':>22}")
    for name in ONLINE:
        if run := runs.get(f"online_{name}"):
            first, last = run["rounds"][0], [one for one in run["rounds"] if one["kl"] <= MAX_KL][-1]
            ratios[f"{name}_win_rate_gain_points"] = round(100 * (last["win_rate"] - first["win_rate"]), 1)
            ratios[f"{name}_kl_nats"] = round(last["kl"], 2)
            ratios[f"{name}_instruction_loss_ratio"] = round(last["instruction_loss"] / first["instruction_loss"], 4)
            print(
                f"{name:<22}{first['win_rate']:>9.2f} → {last['win_rate']:.2f}{last['kl']:>10.2f}"
                f"{first['reward']:>8.2f} → {last['reward']:.2f}{first['tokens']:>7.0f} → {last['tokens']:.0f}"
                f"{first['instruction_loss']:>12.3f} → {last['instruction_loss']:.3f}"
            )
    online = {name.removeprefix("online_"): run for name, run in runs.items() if name.startswith("online_")}
    if online:
        _draw(online, folder / "learning.png")
        print(f"\npicture: {folder / 'learning.png'}")
    (folder / "learning.json").write_text(json.dumps(runs, indent=1))
    print(json.dumps({"bench": "learning", "ratios": ratios, "runs": len(runs)}), flush=True)


def _draw(runs: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), constrained_layout=True)
    for axis, (x, label) in zip(
        axes[0], (("kl", "KL to the start, nats a response"), ("reward", "reward"), ("tokens", "tokens")), strict=True
    ):
        for name, run in runs.items():
            axis.plot([r[x] for r in run["rounds"]], [r["win_rate"] for r in run["rounds"]], marker="o", label=name)
        axis.set(xlabel=label, ylabel="win rate against the start", ylim=(0, 1))
        axis.axhline(0.65, color="grey", linewidth=0.8, linestyle=":")
    axes[0][0].legend(fontsize=8)
    shown = [name for name in ("ppo", "ppo_without_baseline") if name in runs]
    for axis, (y, label) in zip(axes[1], (("train_reward", "reward as PPO sees it"), ("kl", "KL, nats")), strict=False):
        for name in shown:
            axis.plot([r.get(y, math.nan) for r in runs[name]["rounds"]], marker="o", label=name)
        axis.set(xlabel="round", ylabel=label, title="with and without the reference baseline")
        if shown:
            axis.legend(fontsize=8)
    for name in (name for name in ("dpo", "dpo_sft") if name in runs):
        axes[1][2].plot([r["instruction_loss"] for r in runs[name]["rounds"]], marker="o", label=name)
    axes[1][2].set(xlabel="round", ylabel="held-out instruction loss", title="with and without SFT mixed in")
    axes[1][2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean(values: list[float]) -> float:
    """Their mean; 0 of none."""
    return statistics.fmean(values) if values else 0.0


if __name__ == "__main__":
    main()
