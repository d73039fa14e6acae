"""The least that passes for a model, for the tests of fetching one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from trainer.base.progress import Progress

SILENT = Progress(shown=False)


def fill(folder: Path) -> None:
    """The least that passes for a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"weight": np.arange(64, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
