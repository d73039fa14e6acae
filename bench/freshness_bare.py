"""The peer of `make bench-freshness`: a bare training step, or a bare reload, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import runtime


def step(model: Path, path: Path) -> Callable[[], None]:
    """A DPO step on the pairs in a file, with the reference's pass, in bare PyTorch (`bench/trainer_peers.py`)."""
    runtime.prepare(threads=0)
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoTokenizer

    from bench.trainer_peers import Master
    from trainer import batch as batches
    from trainer import models
    from trainer.samples import Pair

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    pairs = []
    for number, fields in enumerate(json.loads(path.read_text())):
        turns = [{"role": "user", "content": fields["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        pairs.append(
            Pair(
                id=str(number), prompt=tuple(prompt), chosen=tuple(fields["chosen"]), rejected=tuple(fields["rejected"])
            )
        )
    policy, reference = models.load_causal(model), models.load_causal(model).eval()
    master = Master(policy)
    layouts = [batches.collate(rows) for rows in batches.micro_batches(pairs, 1024)]

    def work() -> None:
        for batch in layouts:
            with torch.no_grad():
                expected = models.response_logprobs(reference, batch).view(-1, 2)
            ratios = models.response_logprobs(policy, batch).view(-1, 2) - expected
            (-logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).sum() / len(pairs)).backward()  # type: ignore[no-untyped-call]
        master.step()

    return work


def reload(model: Path) -> Callable[[], None]:
    """vLLM's own reload of a model's weights."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    import vllm

    from services.engine import computing_dtype

    dtype = computing_dtype(on_cpu=not torch.cuda.is_available())  # as ours
    llm = vllm.LLM(model=str(model), enforce_eager=True, max_model_len=512, dtype=dtype, disable_log_stats=True)
    return lambda: (llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)}), None)[1]


def main() -> None:
    """Times it so often, after a first time that does not count."""
    from trainer import base

    what, path, repeats = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    model = base.fetch(sys.argv[4] or None)
    if what == "step":
        runtime.before_imports()
    work = step(model, path) if what == "step" else reload(model)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    print("@" + json.dumps(seconds[1:]), flush=True)


if __name__ == "__main__":
    main()
