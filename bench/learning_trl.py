"""The peer of `make bench-learning`: the same data through TRL's trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.learning import KL_WEIGHT

STEP = 8
"""Pairs, thumbs or groups of rollouts an optimizer step, as ours."""


def learn(world: Any, name: str, samples: Sequence[Any], folder: Path, *, rate: float) -> None:
    """Trains the base model by TRL on pairs, for GRPO and RLOO on groups of rollouts, in steps of as many as ours, and
    writes it into a folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(world.base), dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": str(folder.with_name("trl")),
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": True,
        "seed": world.seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_dropout": True,
        "gradient_checkpointing": False,
    }
    make = {"kto": _kto, "grpo": _from_rollouts, "rloo": _from_rollouts}.get(name, _dpo)
    trainer = make(world, name, samples, {"model": model, "processing_class": world.tokenizer}, common)
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(folder)


def _text(world: Any, tokens: Sequence[int]) -> str:
    return str(world.tokenizer.decode(tokens))


def _response(world: Any, tokens: Sequence[int]) -> str:
    return _text(world, tokens).removesuffix(world.tokenizer.eos_token)


def _dpo(world: Any, name: str, pairs: Sequence[Any], given: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = [
        {
            "prompt": _text(world, pair.prompt),
            "chosen": _response(world, pair.chosen),
            "rejected": _response(world, pair.rejected),
        }
        for pair in pairs
    ]
    arguments = DPOConfig(
        **common,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=STEP // 2,
        beta=0.1,
        max_length=512,
        loss_type=["sigmoid" if name == "dpo" else name],
    )
    return DPOTrainer(args=arguments, train_dataset=Dataset.from_list(rows), **given)


def _kto(world: Any, _: str, pairs: Sequence[Any], given: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    rows = [
        {"prompt": _text(world, pair.prompt), "completion": _response(world, response), "label": liked}
        for pair in pairs
        for response, liked in ((pair.chosen, True), (pair.rejected, False))
    ]
    arguments = KTOConfig(**common, per_device_train_batch_size=STEP, beta=0.1, max_length=512)
    return KTOTrainer(args=arguments, train_dataset=Dataset.from_list(rows), **given)


def _from_rollouts(
    world: Any, name: str, groups: Sequence[Any], given: Mapping[str, Any], common: Mapping[str, Any]
) -> Any:
    """These two make rollouts themselves: here they are given those that there are."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    count = len(groups[0].rollouts)
    by_prompt = {tuple(group.prompt): group.rollouts for group in groups}
    rewards = {rollout.tokens: rollout.reward for group in groups for rollout in group.rollouts}

    class Given:
        """In front of a trainer: no model generates."""

        def _generate_single_turn(self, prompt_ids: Sequence[Sequence[int]], *_: Any, **__: Any) -> Any:
            # A prompt comes once for each of its rollouts, one after the other.
            found = [list(by_prompt[tuple(ids)][n % count].tokens) for n, ids in enumerate(prompt_ids)]
            return (found, None) if name == "grpo" else found

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [rewards[tuple(ids)] for ids in completion_ids]

    trainer, config = (GRPOTrainer, GRPOConfig) if name == "grpo" else (RLOOTrainer, RLOOConfig)
    arguments = config(
        **common,
        **({"loss_type": "grpo", "scale_rewards": "group"} if name == "grpo" else {}),
        per_device_train_batch_size=count,
        gradient_accumulation_steps=STEP,
        beta=KL_WEIGHT,
        num_generations=count,
        shuffle_dataset=False,
        max_completion_length=512,
    )
    dataset = Dataset.from_list([{"prompt": _text(world, group.prompt)} for group in groups])
    return type("Given", (Given, trainer), {})(args=arguments, reward_funcs=reward, train_dataset=dataset, **given)
