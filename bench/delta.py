"""`make bench-delta`: bytes of a delta over bytes of the full weights, for consecutive versions of a real run.

The default model answers the demo's prompts, twice each; the shorter answer is preferred; DPO learns from that with the
trainer's own learner, a round a version, at the default learning rate (the paper's, 1e-6) and at the demo's. Each delta
is applied, and must come to the very bytes of the full weights.

`delta_bytes` is at the default learning rate, `delta_bytes_demo` at the demo's; the peer is the full weights.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness
from trainer import runtime
from trainer.samples import Pair

runtime.before_imports()

DEMO_LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class Measured:
    """A delta of one version."""

    learning_rate: float
    changed: float
    """Share of the weights that changed."""
    ratio: float
    """Bytes of the delta over bytes of the full weights."""
    write_seconds: float
    apply_seconds: float


def samples(base: Path, count: int) -> list[Pair]:
    """Pairs of the model's own answers to the demo's prompts, in tokens."""
    import torch
    import uuid_utils
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from thumbwheel.demo import prompts

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(base), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    asked = prompts.train_prompts()[:count]
    found = []
    for at in range(0, len(asked), 16):
        chats = [[{"role": "user", "content": text}] for text in asked[at : at + 16]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=64, num_return_sequences=2)
        width = inputs["input_ids"].shape[1]
        for index in range(len(chats)):
            prompt = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].tolist()
            answers = sorted((_until_end(row, tokenizer) for row in out[2 * index : 2 * index + 2, width:]), key=len)
            chosen, rejected = answers
            found.append(Pair(id=str(uuid_utils.uuid7()), prompt=tuple(prompt), chosen=chosen, rejected=rejected))
    return found


def _until_end(row: Any, tokenizer: Any) -> tuple[int, ...]:
    tokens: list[int] = row.tolist()
    end = tokenizer.eos_token_id
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def versions(base: Path, pairs: Sequence[Pair], learning_rate: float, rounds: int, folder: Path) -> list[Path]:
    """The base and, after each round, what was learnt."""
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses
    from trainer.config import TrainerSettings
    from trainer.inference import reference_logprobs
    from trainer.learner import Learner

    settings = TrainerSettings(policy_learning_rate=learning_rate)
    objective = losses.objective("dpo", ModelRole.MODEL_ROLE_POLICY, settings)
    reference = reference_logprobs(base, pairs, max_tokens=runtime.pass_tokens(settings.micro_batch_tokens))
    learner = Learner(objective, base, settings, learning_rate=learning_rate)
    found = [folder / "0"]
    learner.write_model(found[0])
    size = len(pairs) // rounds
    for number in range(rounds):
        part = pairs[number * size : (number + 1) * size]
        measured = learner.learn(part, reference, round_number=number + 1)
        found.append(folder / str(number + 1))
        learner.write_model(found[-1])
        print(f"lr {learning_rate:g}, round {number + 1}: {len(part)} pairs, loss {measured['loss']:.4f}", flush=True)
    learner.close()
    return found


def learnt(folder: Path, model: str | None, *, pairs: int, rounds: int) -> list[Path]:
    """As `versions`, at the default learning rate, by a process of its own: its memory goes with it."""
    command = [sys.executable, "-m", "bench.delta", "--pairs", str(pairs), "--rounds", str(rounds)]
    command += ["--write", str(folder), *(["--model", model] if model else [])]
    subprocess.run(command, check=True, timeout=1800)
    return [folder / str(number) for number in range(rounds + 1)]


def measure(parent: Path, child: Path, learning_rate: float) -> Measured:
    """Writes a delta, applies it, and compares every byte (by hash)."""
    from thumbwheel import files
    from thumbwheel.checkpoints import delta

    before, after = parent / "model.safetensors", child / "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        packed, made = Path(folder, "delta"), Path(folder, "made")
        start = time.perf_counter()
        delta.write(before, after, packed)
        written = time.perf_counter()
        delta.apply(before, packed, made, sha256=files.sha256(after))
        applied = time.perf_counter()
        assert files.sha256(made) == files.sha256(after)
        return Measured(
            learning_rate,
            delta.changed_share(before, after),
            packed.stat().st_size / after.stat().st_size,
            written - start,
            applied - written,
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.delta")
    parser.add_argument("--pairs", type=int, default=96, help="pairs to learn from, over all rounds")
    parser.add_argument("--rounds", type=int, default=2, help="versions at each learning rate")
    parser.add_argument("--model", default=None, help="a folder or a Hugging Face id; the default model where left out")
    parser.add_argument("--write", type=Path, default=None, help="only learn, and leave the versions in this folder")
    given = parser.parse_args()
    runtime.prepare(threads=0)
    from trainer import base
    from trainer.config import TrainerSettings

    model = base.fetch(given.model)
    pairs = samples(model, given.pairs)
    default = TrainerSettings().policy_learning_rate
    if given.write is not None:
        versions(model, pairs, default, given.rounds, given.write)
        return
    found: list[Measured] = []
    for learning_rate in (default, DEMO_LEARNING_RATE):
        with tempfile.TemporaryDirectory() as folder:
            made = versions(model, pairs, learning_rate, given.rounds, Path(folder))
            found += [measure(a, b, learning_rate) for a, b in itertools.pairwise(made)]
    print("learning rate  changed  delta/full  write s  apply s")
    for one in found:
        print(
            f"{one.learning_rate:13g}  {one.changed:6.2%}  {one.ratio:10.4f}  {one.write_seconds:7.2f}"
            f"  {one.apply_seconds:7.2f}"
        )
    ratios = {default: harness.Ratio("delta_bytes", "MB", harness.Target(most=0.05))}
    ratios[DEMO_LEARNING_RATE] = harness.Ratio("delta_bytes_demo", "MB")
    full = (model / "model.safetensors").stat().st_size / 1e6
    for one in found:
        ratios[one.learning_rate].add(one.ratio * full, full)
    harness.report("delta", list(ratios.values()), given.rounds)


if __name__ == "__main__":
    main()
