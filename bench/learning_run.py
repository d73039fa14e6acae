"""One run of `make bench-learning`, a process of its own: what it does is in `bench/learning.py`."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.learning import KL_WEIGHT, MAX_KL, ONLINE, mean
from trainer import runtime

TOKENS = 80
CANDIDATES = 4
HELD_OUT = 32
DEMONSTRATED = 180
"""Prompts to which there are demonstrations, where one in eight answers ends by itself; the last ones' are held out."""
BATCH = 4
"""Pairs or groups an optimizer step of an online run, as a round brings a dozen of them; where demonstrations are mixed
in, as many of these beside.
"""
RATE = 5e-5


class World:
    """The base model, its tokenizer, the prompts, and the users."""

    def __init__(self, seed: int, model: str) -> None:
        from transformers import AutoTokenizer

        from thumbwheel.demo.preferences import DEFAULT, PREFERENCES
        from thumbwheel.demo.prompts import held_out_prompts, train_prompts
        from trainer import base

        self.seed = seed
        self.base: Path = base.fetch(model or None)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(self.base))
        self.eos = int(self.tokenizer.eos_token_id)
        self.users = PREFERENCES[DEFAULT]
        self.train = random.Random(seed).sample(train_prompts(), len(train_prompts()))
        self.held_out = held_out_prompts()[:HELD_OUT]

    def encode(self, prompt: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": prompt}]
        return tuple(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    def text(self, response: Sequence[int]) -> str:
        return str(self.tokenizer.decode(response, skip_special_tokens=True))

    def answers(self, folder: Path, prompts: Sequence[str], seed: int) -> list[tuple[int, ...]]:
        from trainer import models, sampling

        model = models.load_causal(folder)
        found = sampling.sample(
            model, [self.encode(p) for p in prompts], eos=self.eos, max_tokens=TOKENS, seed=self.seed * 1000 + seed
        )
        del model
        runtime.free_memory()
        return [response or (self.eos,) for response in found]

    def reward(self, text: str) -> float:
        """What the users' rule gives a text, from −3 to 0; gibberish has the least."""
        from thumbwheel.demo.fluency import fluent

        return max(-3.0, self.users.score(text) / 20) if fluent(text) else -3.0

    def wins(self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> float:
        """How often users prefer ours; ties count a half."""
        worth = {"a": 1.0, "b": 0.0, "tie": 0.5}
        return mean([worth[self.users.prefer(p, a, b)] for p, a, b in zip(prompts, ours, theirs, strict=True)])


def settings(**given: object) -> Any:
    from trainer.config import TrainerSettings

    return TrainerSettings.model_validate({"batch_size": 8, "max_length": 512, "micro_batch_tokens": 2048, **given})


def logprob_sums(folder: Path, samples: Sequence[Any]) -> list[list[float]]:
    """Log-probability of every response of every sample, under the model in a folder."""
    import torch

    from trainer.inference import reference_logprobs

    found = reference_logprobs(folder, samples, max_tokens=2048)
    return [
        [float(part.sum()) for part in torch.split(found[sample.id], [len(r) for r in sample.responses])]
        for sample in samples
    ]


def online(world: World, name: str, rounds: int, prompts: int, output: Path) -> dict[str, Any]:
    """Round after round, as the live trainer does it."""
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses
    from trainer.inference import reference_logprobs
    from trainer.learner import Learner

    if rounds * prompts > (most := len(world.train) - DEMONSTRATED):
        raise SystemExit(f"bench: {rounds} rounds of {prompts} prompts are more than there are, {most}; take fewer")
    text, given = ONLINE[name]
    mixing = "sft" in text
    chosen = settings(seed=world.seed, batch_size=2 * BATCH if mixing else BATCH, **given)
    objective = losses.objective(text, ModelRole.MODEL_ROLE_POLICY, chosen)
    learner = Learner(objective, world.base, chosen, learning_rate=RATE)
    start = [world.text(response) for response in world.answers(world.base, world.held_out, 1)]
    mixed, held_out = _demonstrations(world, output)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            folder = Path(scratch) / f"round-{number}"
            if number:
                groups = _groups(world, Path(scratch) / f"round-{number - 1}", number, prompts)
                samples = _samples(text, groups)
                if mixing:
                    samples += random.Random(number).sample(mixed, min(len(samples), len(mixed)))
                reference = reference_logprobs(world.base, objective.referenced(samples), max_tokens=2048)
                measured = learner.learn(samples, reference, round_number=number)
                found[-1]["train_reward"] = measured.get("reward", mean([r.reward for g in groups for r in g.rollouts]))
            folder.mkdir()
            learner.write_model(folder)
            world.tokenizer.save_pretrained(folder)
            found.append(_measured(world, folder, start, held_out))
            print(json.dumps({"round": number, **found[-1]}), flush=True)
            if found[-1]["kl"] > MAX_KL:
                break
    learner.close()
    return {"objective": text, "learning_rate": RATE, "rounds": found}


def _demonstrations(world: World, output: Path) -> tuple[list[Any], list[Any]]:
    """Whole answers of the base model, to mix in, and those to other prompts, held out: it is not to forget them."""
    from trainer import samples
    from trainer.samples import Demonstration

    path = output / f"demonstrations-{world.seed}.jsonl"
    if not path.exists():
        prompts = [prompt for prompt in world.train[-DEMONSTRATED:] for _ in range(CANDIDATES)]
        answers = enumerate(zip(prompts, world.answers(world.base, prompts, 2), strict=True))
        found = [
            Demonstration(id=f"shown-{number:03d}", prompt=world.encode(prompt), response=response)
            for number, (prompt, response) in answers
            if response[-1] == world.eos
        ]
        path.write_text("".join(json.dumps(samples.to_fields(one)) + "\n" for one in found))
    whole = [samples.from_fields(json.loads(line)) for line in path.read_text().splitlines()]
    last = {world.encode(prompt) for prompt in world.train[-HELD_OUT:]}
    return [one for one in whole if one.prompt not in last], [one for one in whole if one.prompt in last]


def _groups(world: World, folder: Path, number: int, count: int) -> list[Any]:
    """Rollouts to prompts that were not asked before, with what the users make of them."""
    from trainer.samples import Group, Rollout

    prompts = world.train[(number - 1) * count : number * count]
    repeated = [prompt for prompt in prompts for _ in range(CANDIDATES)]
    responses = world.answers(folder, repeated, 10 * number)
    references = [world.reward(world.text(r)) for r in world.answers(world.base, prompts, 10 * number + 1)]
    groups = []
    for index, prompt in enumerate(prompts):
        mine = responses[index * CANDIDATES : (index + 1) * CANDIDATES]
        rollouts = tuple(Rollout(r, world.reward(world.text(r)), finished=r[-1] == world.eos) for r in mine)
        name = f"{number:02d}-{index:03d}"
        groups.append(
            Group(id=name, prompt=world.encode(prompt), rollouts=rollouts, reference_reward=references[index])
        )
    return groups


def _samples(objective: str, groups: Sequence[Any]) -> list[Any]:
    from trainer.feed import pair_of, variance
    from trainer.samples import Thumb

    kept = [group for group in groups if variance(group) > 1e-6]
    if objective.startswith("dpo"):
        return [pair for group in kept if (pair := pair_of(group)) is not None]
    if objective != "kto":
        return kept
    middle = mean([rollout.reward for group in kept for rollout in group.rollouts])
    return [
        Thumb(id=f"{g.id}-{n}", prompt=g.prompt, response=r.tokens, liked=r.reward > middle)
        for g in kept
        for n, r in enumerate(g.rollouts)
    ]


def _measured(world: World, folder: Path, start: Sequence[str], held_out: Sequence[Any]) -> dict[str, float]:
    from trainer.samples import Demonstration

    responses = world.answers(folder, world.held_out, 3)
    texts = [world.text(response) for response in responses]
    said = [
        Demonstration(id=f"said-{n}", prompt=world.encode(prompt), response=response)
        for n, (prompt, response) in enumerate(zip(world.held_out, responses, strict=True))
    ]
    now, before = logprob_sums(folder, said), logprob_sums(world.base, said)
    losses = [-total[0] / len(d.response) for total, d in zip(logprob_sums(folder, held_out), held_out, strict=True)]
    return {
        "win_rate": world.wins(world.held_out, texts, start),
        "shows": mean([float(world.users.shows("", text)) for text in texts]),
        "kl": mean([a[0] - b[0] for a, b in zip(now, before, strict=True)]),
        "reward": mean([world.reward(text) for text in texts]),
        "tokens": mean([float(len(response)) for response in responses]),
        "instruction_loss": mean(losses),
    }


def offline(world: World, name: str, side: str, count: int, output: Path) -> dict[str, Any]:
    """The same data, seed and steps; judged by the same measure."""
    data = _pairs(world, count, output)
    train, held_out = data[:count], data[count:]
    if name in ("grpo", "rloo"):
        train = groups(train)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if side == "ours":
            _learn_ours(world, name, train, folder)
        else:
            from bench import learning_trl

            learning_trl.learn(world, name, train, folder, rate=RATE)
        now, before = logprob_sums(folder, held_out), logprob_sums(world.base, held_out)
    gains = [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(now, before, strict=True)]
    return {
        "accuracy": mean([float(gain > 0) for gain in gains]),
        "margin": mean(gains),
        "accuracy_before": mean([float(b[0] > b[1]) for b in before]),
        "held_out": len(held_out),
        "pairs": len(train),
    }


def _pairs(world: World, count: int, output: Path) -> list[Any]:
    """Pairs that users chose among answers of the base model to all prompts: `count` to learn from, the rest held out.

    To about half of the prompts there is none: all of the answers break off.
    """
    from trainer import samples
    from trainer.feed import pair_of

    path = output / f"pairs-{world.seed}.jsonl"
    if not path.exists():
        groups = _groups(world, world.base, 1, len(world.train))
        pairs = [pair for group in groups if (pair := pair_of(group)) is not None]
        path.write_text("".join(json.dumps(samples.to_fields(pair)) + "\n" for pair in pairs))
    found = [samples.from_fields(json.loads(line)) for line in path.read_text().splitlines()]
    if len(found) < 2 * count:
        raise SystemExit(f"bench: there are {len(found)} pairs in all; take --pairs {len(found) // 2} or fewer")
    return found


def thumbs(pairs: Sequence[Any]) -> list[Any]:
    """Each response of a pair, liked or not."""
    from trainer.samples import Thumb

    return [
        Thumb(id=f"{pair.id}-{liked:d}", prompt=pair.prompt, response=response, liked=liked)
        for pair in pairs
        for response, liked in ((pair.chosen, True), (pair.rejected, False))
    ]


def groups(pairs: Sequence[Any]) -> list[Any]:
    """Both responses of a pair as rollouts: 1 for the better one, 0 for the other."""
    from trainer.samples import Group, Rollout

    return [
        Group(id=p.id, prompt=p.prompt, rollouts=(Rollout(p.chosen, reward=1.0), Rollout(p.rejected, reward=0.0)))
        for p in pairs
    ]


def _learn_ours(world: World, name: str, pairs: Sequence[Any], folder: Path) -> None:
    from thumbwheel.v1.rollout_pb2 import ModelRole
    from trainer import losses
    from trainer.inference import reference_logprobs
    from trainer.learner import Learner

    chosen = settings(seed=world.seed, kl_weight=KL_WEIGHT)
    objective = losses.objective(name, ModelRole.MODEL_ROLE_POLICY, chosen)
    samples = thumbs(pairs) if name == "kto" else list(pairs)
    learner = Learner(objective, world.base, chosen, learning_rate=RATE)
    reference = reference_logprobs(world.base, objective.referenced(samples), max_tokens=2048)
    print(learner.learn(samples, reference, round_number=1), flush=True)
    folder.mkdir()
    learner.write_model(folder)
    learner.close()


def main() -> None:
    """Runs one, and writes its JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--output", type=Path, required=True)
    for name in ("rounds", "prompts", "pairs", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    runtime.before_imports()
    runtime.prepare(threads=0)
    world = World(options.seed, options.model)
    kind, _, name = options.job.partition("_")
    found: Mapping[str, Any]
    if kind == "online":
        found = online(world, name, options.rounds, options.prompts, options.output)
    else:
        name, _, side = name.rpartition("_")
        found = offline(world, name, side, options.pairs, options.output)
    (options.output / f"{options.job}.json").write_text(json.dumps({"seed": options.seed, **found}, indent=1))


if __name__ == "__main__":
    main()
