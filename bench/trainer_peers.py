"""The peers of `bench/trainer.py`: TRL's trainers as they come, and bare PyTorch loops with the tricks that ours uses.

TRL runs in the precision that is its fastest on this CPU, bf16 or fp32, without recomputing activations. The bare loops
have what makes ours fast (shared prompts, lengths that go together, logits at responses alone, the two operations of
`kernels`, bf16 weights with fp32 master weights, gradients added up in fp32) and nothing around it: no DeepSpeed, no
objectives.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench.trainer_sides import BATCH_SIZE, BETA, KL_WEIGHT, MAX_LENGTH, RATE, ROLLOUTS, Commands
from trainer import batch as batches
from trainer import kernels, models
from trainer.batch import Batch
from trainer.samples import Group, Pair

_BUDGET = 1024
"""Tokens of a micro-batch, as ours."""
_NEVER = 1_000_000


class Master:
    """bf16 parameters, their fp32 masters, and AdamW on these."""

    def __init__(self, model: Any) -> None:
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32
        self.masters = [p.detach().float() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clips, steps, and makes the bf16 weights anew."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        torch._foreach_copy_(self.parameters, self.masters)


def _layouts(samples: Sequence[Any], budget: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `budget` tokens, with the places of their samples."""
    places = {sample.id: place for place, sample in enumerate(samples)}
    for rows in batches.micro_batches(samples, budget):
        yield [places[row.sample.id] for row in rows], batches.collate(rows)


def _bare_dpo(commands: Commands) -> None:
    policy, reference = models.load_causal(commands.model), models.load_causal(commands.model).eval()
    master = Master(policy)
    for samples in commands.rounds():
        sums: dict[int, Tensor] = {}
        with torch.no_grad():
            for places, batch in _layouts(samples, 2 * _BUDGET):
                found = models.response_logprobs(reference, batch).view(-1, 2)
                sums.update(zip(places, found, strict=True))
        for start in range(0, len(samples), BATCH_SIZE):
            step = samples[start : start + BATCH_SIZE]
            for places, batch in _layouts(step, _BUDGET):
                expected = torch.stack([sums[start + place] for place in places])
                ratios = models.response_logprobs(policy, batch).view(-1, 2) - expected
                (-logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum() / len(step)).backward()  # type: ignore[no-untyped-call]
            master.step()
        commands.done()


def _bare_ppo(commands: Commands) -> None:
    policy, reference = models.load_causal(commands.model), models.load_causal(commands.model).eval()
    critic = models.new_scorer(commands.model)
    masters = Master(policy), Master(critic)
    for samples in commands.rounds():
        before: dict[int, tuple[Tensor, ...]] = {}
        layouts = list(_layouts(samples, 2 * _BUDGET))
        with torch.no_grad():
            for number, (_, batch) in enumerate(layouts):
                before[number] = (
                    models.response_token_logprobs(policy, batch),
                    models.values(critic, batch),
                    models.response_token_logprobs(reference, batch),
                )
        told: dict[Any, tuple[Tensor, ...]] = {}
        for number, (_, batch) in enumerate(layouts):
            told.update(_advantages(batch, *before[number]))
        spread = torch.cat([advantages for advantages, *_ in told.values()])
        mean, deviation = spread.mean(), spread.std()
        for start in range(0, len(samples), BATCH_SIZE // ROLLOUTS):
            step = samples[start : start + BATCH_SIZE // ROLLOUTS]
            size = sum(len(sample.responses) for sample in step)
            for _, batch in _layouts(step, _BUDGET):
                keys = [(r.sample.id, i) for r in batch.rows for i in range(r.first, r.last)]
                advantages, returns, old = (torch.cat([told[key][part] for key in keys]) for part in range(3))
                ratio = (models.response_token_logprobs(policy, batch) - old).exp()
                scaled = (advantages - mean) / deviation
                loss = torch.maximum(-scaled * ratio, -scaled * ratio.clamp(0.8, 1.2))
                value = 0.5 * (models.values(critic, batch) - returns) ** 2
                (batch.means(loss + value).sum() / size).backward()  # type: ignore[no-untyped-call]
            for master in masters:
                master.step()
        commands.done()


def _advantages(
    batch: Batch, old: Tensor, values: Tensor, reference: Tensor
) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
    """By sample and response: advantages, returns and old log-probabilities of its tokens. γ 1, λ 0.95."""
    lengths = [int(length) for length in batch.lengths]
    parts = zip(*(torch.split(tensor, lengths) for tensor in (old, values, reference)), strict=True)
    keys = [(row.sample, index) for row in batch.rows for index in range(row.first, row.last)]
    for (sample, index), (before, value, base) in zip(keys, parts, strict=True):
        assert isinstance(sample, Group), "PPO learns from rollouts"
        rewards = -KL_WEIGHT * (before - base)
        rewards[-1] += sample.rollouts[index].reward
        found, later, following = torch.zeros_like(rewards), 0.0, 0.0
        for t in reversed(range(len(rewards))):
            later = float(rewards[t]) + following - float(value[t]) + 0.95 * later
            following, found[t] = float(value[t]), later
        yield (sample.id, index), (found, found + value, before)


def _trl(**more: Any) -> dict[str, Any]:
    """What TRL's trainers are given, whichever they are."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": kernels.multiplies_bf16(),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "max_steps": _NEVER,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **more,
    }


def _stepping(commands: Commands, steps: int) -> Any:
    """A callback that lets TRL make `steps` optimizer steps for each round, and then waits for the next."""
    from transformers import TrainerCallback

    rounds = commands.rounds()

    class Stepping(TrainerCallback):  # type: ignore[misc]
        left = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.left:
                if next(rounds, None) is None:
                    control.should_training_stop = True
                    raise _Ended
                self.left = steps

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if not self.left:
                commands.done()

    return Stepping()


class _Ended(Exception):
    """No more rounds."""


def _train(trainer: Any) -> None:
    try:
        trainer.train()
    except _Ended:
        return


def _trl_dpo(commands: Commands) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(str(commands.model))
    texts = [
        {
            "prompt": tokenizer.decode(sample.prompt),
            "chosen": tokenizer.decode(sample.chosen),
            "rejected": tokenizer.decode(sample.rejected),
        }
        for sample in commands.samples
        if isinstance(sample, Pair)
    ]
    made = _trl(per_device_train_batch_size=4, gradient_accumulation_steps=BATCH_SIZE // 4)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(str(commands.model), dtype=torch.float32) for _ in range(2)
    )
    trainer = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(**made, beta=BETA, max_length=MAX_LENGTH),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        callbacks=[_stepping(commands, 2)],
    )
    _train(trainer)


def _trl_grpo(commands: Commands) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, import_utils

    import_utils.is_vllm_available = lambda *_, **__: False  # nothing is generated
    tokenizer = AutoTokenizer.from_pretrained(str(commands.model))
    groups = [sample for sample in commands.samples if isinstance(sample, Group)]
    rewards = {rollout.tokens: rollout.reward for group in groups for rollout in group.rollouts}

    def rollouts(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """A prompt comes once for each of its rollouts."""
        wanted = [groups[int(prompt)] for prompt in prompts]
        completions = [group.rollouts[number % ROLLOUTS].tokens for number, group in enumerate(wanted)]
        return {
            "prompt_ids": [list(group.prompt) for group in wanted],
            "completion_ids": [list(tokens) for tokens in completions],
            "logprobs": None,
        }

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [rewards[tuple(ids)] for ids in completion_ids]

    made = _trl(per_device_train_batch_size=4, gradient_accumulation_steps=BATCH_SIZE // 4)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(str(commands.model), dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            **made, beta=KL_WEIGHT, num_generations=ROLLOUTS, shuffle_dataset=False, max_completion_length=MAX_LENGTH
        ),
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(groups))]),
        processing_class=tokenizer,
        callbacks=[_stepping(commands, 2)],
        rollout_func=rollouts,
    )
    _train(trainer)


SIDES: dict[str, Callable[[Commands], None]] = {
    "bare-dpo": _bare_dpo,
    "bare-ppo": _bare_ppo,
    "trl-dpo": _trl_dpo,
    "trl-grpo": _trl_grpo,
}
