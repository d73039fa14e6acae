"""Turns a GGUF file into what Transformers, vLLM and DeepSpeed load: bfloat16 safetensors, configuration, tokenizer.

A process of its own (`python -m trainer.base.gguf FILE FOLDER`), so that its caller need not hold torch in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model in `gguf`, dequantised and rounded to bfloat16, into the existing `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    # A model of the same configuration, but no longer quantised, and that does not claim the name in the GGUF header.
    for attribute in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config.name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    for passing in ("is_local", "local_files_only"):  # how it was loaded now, not what it is
        tokenizer.init_kwargs.pop(passing, None)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
