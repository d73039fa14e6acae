"""A file of HH-RLHF pairs, through everything: taken in, curated, written in each format, and trained on by TRL.

    make check-hh DATA=harmless-base.jsonl.gz

Which rows are malformed is decided here, by rules of this module's own: those rows must be refused, and no others. Then
TRL's DPOTrainer and RewardTrainer are given each exported file as it is: both prepare all of its rows, and make a step.
The data set is not part of the project; nothing in `make test` needs it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.support import make_tiny_llama
from thumbwheel.auth import create_keys

FORMATS = ("trl", "trl-chat", "hh", "openrlhf")
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def malformed(pair: dict[str, str]) -> bool:
    """Whether two dialogues differ in more than their last reply, or in nothing, or are none that end with a reply."""
    chosen, rejected = (_TURN.split(pair[side]) for side in ("chosen", "rejected"))
    dialogues = all(not parts[0] and parts[1::2][:1] == ["Human"] for parts in (chosen, rejected))
    replies = chosen[-2:-1] == rejected[-2:-1] == ["Assistant"]
    return not (dialogues and replies) or chosen[:-1] != rejected[:-1] or chosen[-1] == rejected[-1]


def command(home: Path, *arguments: str) -> dict[str, Any]:
    """Runs `thumbwheel` on this home, and returns what it printed."""
    run = [sys.executable, "-m", "thumbwheel.cli", *arguments, "--home", str(home), "--json"]
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def train(path: Path, model: Path, folder: Path) -> dict[str, float]:
    """A step of each trainer on the file, loaded as TRL's users load it. Returns the losses."""
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    losses = {}
    causal, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    common = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "max_length": 512}
    for name, trainer, config, loaded in (
        ("dpo", DPOTrainer, DPOConfig, causal.from_pretrained(str(model))),
        ("reward", RewardTrainer, RewardConfig, classifier.from_pretrained(str(model), num_labels=1)),
    ):
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
        given = trainer(
            model=loaded,
            args=config(output_dir=str(folder / "out"), **common, **quiet),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(str(model)),
        )
        losses[name] = round(given.train().training_loss, 4)
    return losses


def main() -> int:
    """Parses the arguments, runs, and says how it went."""
    parser = argparse.ArgumentParser(prog="make check-hh", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="JSON lines of chosen and rejected dialogues, gzipped or not")
    data = parser.parse_args().data.resolve()
    opened = gzip.open if data.suffix == ".gz" else open
    with opened(data, "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    expected = [number for number, pair in enumerate(pairs, 1) if malformed(pair)]
    print(f"{len(pairs):,} pairs, of which {len(expected)} are malformed: lines {expected}")
    with tempfile.TemporaryDirectory(prefix="thumbwheel-hh-") as folder:
        home = Path(folder)
        create_keys(home / "keys")
        copy = home / data.name  # the report of what was refused lies beside the file
        copy.write_bytes(data.read_bytes())
        taken = command(home, "import", str(copy), "--format", "hh")
        print(f"import: {taken}")
        report = Path(f"{copy}.refused.jsonl")
        refused = [json.loads(line)["line"] for line in report.read_text().splitlines()] if report.exists() else []
        model = make_tiny_llama(home / "model", seed=0)
        trained, exported = {}, {}
        for name in FORMATS:
            out = home / f"{name}.jsonl"
            exported[name] = command(home, "export", str(out), "--format", name)
            print(f"export {name}: {exported[name]}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trained[name] = train(out, model, home)
            print(f"trained on {name}: {trained[name]}")
    print(json.dumps({"pairs": len(pairs), "malformed": expected, "refused": refused, "losses": trained}))
    return 0 if refused == expected else 1


if __name__ == "__main__":
    sys.exit(main())
