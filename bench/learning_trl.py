"""The peer of `make bench-learning`: the same data through TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def learn(world: Any, name: str, pairs: Sequence[Any], folder: Path, *, rate: float) -> None:
    """Trains the base model by TRL on the pairs, in steps of as many samples as ours, and writes it into a folder."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

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
        "max_length": 512,
        "beta": 0.1,
        "disable_dropout": True,
        "gradient_checkpointing": False,
    }

    def text(tokens: Sequence[int]) -> str:
        return str(world.tokenizer.decode(tokens))

    if name == "kto":
        rows: list[dict[str, Any]] = [
            {"prompt": text(p.prompt), "completion": text(r).removesuffix(world.tokenizer.eos_token), "label": liked}
            for p in pairs
            for r, liked in ((p.chosen, True), (p.rejected, False))
        ]
        arguments = KTOConfig(per_device_train_batch_size=8, **common)
        trainer = KTOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer
        )
    else:
        rows = [
            {"prompt": text(p.prompt)}
            | {
                key: text(r).removesuffix(world.tokenizer.eos_token)
                for key, r in (("chosen", p.chosen), ("rejected", p.rejected))
            }
            for p in pairs
        ]
        loss = "sigmoid" if name == "dpo" else name
        arguments = DPOConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, loss_type=[loss], **common)
        trainer = DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer
        )
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
