"""The trainer beside TRL and bare PyTorch, on pairs that people judged.

    make bench-trainer DATA=pairs.jsonl        pairs as `python -m trainer --data` takes them; may be gzipped
    make bench-trainer                         questions of the demo, with answers made up for the purpose

SmolLM2-135M, at most 512 tokens, all cores. Every side is a process of its own and works while the others wait; of each
the first round is discarded. A round is two optimizer steps of 8 pairs, or of 8 rollouts (4 a prompt), the reference's
log-probabilities included.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import Ratio, Target
from bench.trainer_sides import BATCH_SIZE, MAX_LENGTH, ROLLOUTS
from thumbwheel import errors
from thumbwheel.demo import prompts
from trainer import base, runtime, samples
from trainer.samples import Group, Pair, Rollout, Sample

_PAIRS = 64
_STEPS = 2
_ANSWER_SECONDS = 600.0


@dataclass
class Side:
    """A process that works when it is told to."""

    name: str
    folder: Path
    setup: Path
    ranks: int = 1
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Side:
        for kind in ("commands", "answers"):
            os.mkfifo(self.folder / f"{self.name}.{kind}")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        module = ["-m", "bench.trainer_sides", self.name, str(self.setup)]
        self.log = self.folder / f"{self.name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *(launch if self.ranks > 1 else []), *module], stdout=log, stderr=log
            )
        self._answers = os.fdopen(os.open(self.folder / f"{self.name}.answers", os.O_RDWR), "r")
        self._answer()
        self._commands = (self.folder / f"{self.name}.commands").open("w", buffering=1)
        return self

    def round(self, numbers: Sequence[int]) -> None:
        """Has it do a round; notes the time and memory that it took."""
        self._commands.write(json.dumps(list(numbers)) + "\n")
        self.last = self._answer()
        self.seconds.append(self.last["seconds"])
        self.memory.append(self.last["memory"])

    def _answer(self) -> dict[str, float]:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not select.select([self._answers], [], [], 1.0)[0]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                ended = self._process.poll()
                what = "did not answer" if ended is None else f"ended with {ended}"
                raise errors.Unavailable(
                    f"{self.name} {what}; its log ends:\n{self.log.read_text()[-3000:]}",
                    remedy="Free some memory, and try again.",
                )
        found: dict[str, float] = json.loads(self._answers.readline())
        return found

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError, AttributeError):
            self._commands.write("null\n")
            self._commands.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)
        self._answers.close()


def read_pairs(path: Path | None, model: Path) -> list[Pair]:
    """The first 64 pairs of a file that fit, or as many of the demo's questions with made-up answers."""
    from transformers import AutoConfig, AutoTokenizer

    from trainer import dataset
    from trainer.encode import RecordEncoder

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    encoder = RecordEncoder(tokenizer, AutoConfig.from_pretrained(str(model)).vocab_size, max_length=MAX_LENGTH)
    found: list[Pair] = []
    skipped = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            pair = encoder.sample(dataset.parse(f"{path or 'demo'}:{number}", line))
        except errors.InvalidArgument:
            skipped += 1
            continue
        if isinstance(pair, Pair) and pair.tokens <= 2 * MAX_LENGTH:
            found.append(pair)
        if len(found) == _PAIRS:
            break
    if len(found) < _PAIRS:
        raise errors.InvalidArgument(
            f"holds {len(found)} pairs that can be used; {_PAIRS} are wanted.",
            field="DATA",
            remedy="Name another file.",
        )
    tokens = [pair.tokens for pair in found]
    mean = statistics.mean(tokens)
    print(f"{len(found)} pairs of {path or 'the demo'}, {mean:.0f} tokens each; {skipped} lines skipped")
    return found


def _lines(path: Path | None) -> Iterator[str]:
    if path is not None:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from file
        return
    draw, questions = random.Random(0), itertools.cycle(prompts.train_prompts())
    words = [word for question in prompts.train_prompts() for word in question.split()]
    for question in itertools.islice(questions, 2 * _PAIRS):
        chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(2))
        messages = [{"role": "user", "content": question}]
        yield json.dumps({"prompt": messages, "chosen": chosen, "rejected": rejected})


def groups_of(pairs: Sequence[Pair]) -> list[Group]:
    """Rollouts for GRPO and PPO: the responses of two pairs, to the prompt of the first, with rewards drawn."""
    draw = random.Random(1)
    found: list[Group] = []
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        responses = [*first.responses, *second.responses]
        rollouts = tuple(Rollout(response, reward=draw.gauss(0.0, 1.0)) for response in responses)
        found.append(Group(id=f"group-{len(found)}", prompt=first.prompt, rollouts=rollouts))
    return found


def measure(
    names: dict[str, int],
    learnt: Sequence[Sample],
    size: int,
    model: Path,
    rounds: int,
    after: Callable[[dict[str, Side]], None],
) -> None:
    """Runs these sides (with so many ranks) in turns, on `size` samples a round. `after` each round that counts."""
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as opened:
        folder = Path(made)
        setup = folder / "setup.json"
        fields: list[dict[str, Any]] = [samples.to_fields(sample) for sample in learnt]
        setup.write_text(json.dumps({"model": str(model), "folder": made, "samples": fields}))
        sides = {name: opened.enter_context(Side(name, folder, setup, ranks)) for name, ranks in names.items()}
        for number in range(rounds + 1):
            numbers = [(number * size + index) % len(learnt) for index in range(size)]
            for place, side in enumerate(list(sides.values())[:: -1 if number % 2 else 1]):
                share = (number + place / len(sides)) / (rounds + 1)
                harness.progress(f"round {number} of {rounds}: {side.name}", share)
                side.round(numbers)
            if number:
                after(sides)
        harness.progress("", 1.0)


def run(model: Path, pairs: Sequence[Pair], rounds: int, only: str) -> list[Ratio]:
    """All figures."""
    groups = groups_of(pairs)
    dpo_trl = Ratio("dpo_vs_trl", "pairs/s", Target(least=2.0))
    dpo_bare = Ratio("dpo_vs_bare", "pairs/s", Target(least=0.95))
    memory = Ratio("memory_vs_trl", "MiB", Target(most=0.8))
    grpo = Ratio("grpo_vs_trl", "samples/s", Target(least=1.5))
    ppo = Ratio("ppo_vs_bare", "samples/s", Target(least=0.95))
    two = Ratio("two_ranks_vs_one", "pairs/s", Target(least=0.9))
    stall = Ratio("checkpoint_stall", "seconds", Target(most=0.05))

    def speed(side: Side, units: int) -> float:
        return units / side.seconds[-1]

    def after_dpo(sides: dict[str, Side]) -> None:
        mine, trl, bare = (sides[name] for name in ("ours-dpo", "trl-dpo", "bare-dpo"))
        size = _STEPS * BATCH_SIZE
        dpo_trl.add(speed(mine, size), speed(trl, size))
        dpo_bare.add(speed(mine, size), speed(bare, size))
        memory.add(mine.memory[-1] / 2**20, trl.memory[-1] / 2**20)

    def pairwise(ratio: Ratio, mine: str, peer: str, units: int) -> Callable[[dict[str, Side]], None]:
        return lambda sides: ratio.add(speed(sides[mine], units), speed(sides[peer], units))

    def after_checkpoint(sides: dict[str, Side]) -> None:
        last = sides["checkpoints"].last
        stall.add(last["stall"], last["step"] / _STEPS)
        print(f"  a step takes {last['saving_step'] / last['step']:.2f} times as long while a checkpoint is written")

    size, half = _STEPS * BATCH_SIZE, _STEPS * BATCH_SIZE // ROLLOUTS
    if only in ("", "dpo"):
        measure({"ours-dpo": 1, "trl-dpo": 1, "bare-dpo": 1}, pairs, size, model, rounds, after_dpo)
    if only in ("", "grpo"):
        after = pairwise(grpo, "ours-grpo", "trl-grpo", size)
        measure({"ours-grpo": 1, "trl-grpo": 1}, groups, half, model, rounds, after)
    if only in ("", "ppo"):
        measure(
            {"ours-ppo": 1, "bare-ppo": 1}, groups, half, model, rounds, pairwise(ppo, "ours-ppo", "bare-ppo", size)
        )
    if only in ("", "ranks"):
        after = pairwise(two, "two-ranks", "one-rank", size)
        measure({"one-rank": 1, "two-ranks": 2}, pairs, size, model, rounds, after)
    if only in ("", "checkpoint"):
        measure({"checkpoints": 1}, pairs, size, model, rounds, after_checkpoint)
    return [ratio for ratio in (dpo_trl, dpo_bare, grpo, ppo, memory, two, stall) if ratio.ours]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="make bench-trainer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA") or None, help="the pairs; also DATA=")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default %(default)s)")
    parser.add_argument("--only", choices=["dpo", "grpo", "ppo", "ranks", "checkpoint"], default="", help="one part")
    given = parser.parse_args()
    runtime.before_imports()
    runtime.quiet_transformers()
    model = base.fetch(None, progress=sys.stderr.isatty())
    pairs = read_pairs(Path(given.data) if given.data else None, model)
    harness.report("trainer", run(model, pairs, given.rounds, given.only), given.rounds)


if __name__ == "__main__":
    main()
