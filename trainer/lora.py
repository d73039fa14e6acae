"""LoRA (Hu et al., 2021, arXiv 2106.09685): small matrices beside frozen weights learn in their place.

    W + (α/r) B A        A [r, in] random, B [out, r] zero at the start; r is `lora_rank`, α `lora_alpha`

Training checkpoints then hold these matrices alone. What is published is merged, W and all, so that servers of full
weights swap it as any other version; `write_adapter` writes the matrices by themselves, as peft and vLLM read them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer import kernels
from trainer.config import LearningSettings

_ADAPTER = "default"

FOLDER = "adapter"
"""Where a version's adapter lies, below the model that it is merged into."""


def add(model: Any, settings: LearningSettings) -> None:
    """Puts the matrices into a model, or into the policy of an actor and critic, and freezes what they are beside. A
    reward model's head goes on learning. Every process of the same seed begins with the same.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = getattr(model, "policy", model)
    torch.manual_seed(settings.seed)
    config: Any = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear")
    if hasattr(wanted, "score"):
        config.exclude_modules = ["score"]
    inject_adapter_in_model(config, wanted, _ADAPTER)
    if hasattr(wanted, "score"):
        wanted.score.requires_grad_(True)
    for parameter in wanted.parameters():  # and not the buffers, of which some are float32 for a reason
        parameter.data = parameter.data.to(torch.bfloat16)
    kernels.adopt(wanted)


def merged(model: Any) -> dict[str, Tensor]:
    """All weights of a model as they are without the matrices beside them, under the names that it had before."""
    from peft.tuners.lora import Linear

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    saved = model.state_dict().keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        if (layer := layers.get(owner.removesuffix(".base_layer"))) is None:
            found[name] = parameter.detach()
            continue
        whole = parameter.detach()
        if leaf == "weight":
            whole = (whole.float() + layer.get_delta_weight(_ADAPTER).float()).to(whole.dtype)
        found[f"{owner.removesuffix('.base_layer')}.{leaf}"] = whole
    return found


def write_adapter(model: Any, folder: Path) -> None:
    """Writes the matrices and their configuration into `folder`."""
    from peft import get_peft_model_state_dict

    wanted = getattr(model, "policy", model)
    matrices = get_peft_model_state_dict(wanted, adapter_name=_ADAPTER, save_embedding_layers=False)
    # As peft names them where it wraps a model; here they are put into it.
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in matrices.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = copy.copy(wanted.peft_config[_ADAPTER])
    config.inference_mode, config.task_type = True, "CAUSAL_LM"
    config.base_model_name_or_path = str(wanted.config.name_or_path)
    config.save_pretrained(folder)
