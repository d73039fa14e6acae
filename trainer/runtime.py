"""What has to be set in a process before and after its heavy libraries are loaded."""

from __future__ import annotations

import ctypes
import gc
import logging
import os

from thumbwheel import errors


class Stopped(Exception):
    """The process was asked to stop while it learnt. What was begun is given up; nothing of it is kept."""


def before_imports() -> None:
    """Settings that libraries read when they are loaded. To be called before torch is imported."""
    # Threads that wait must sleep: beside a serving engine on the same cores, spinning takes half of its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing here is compiled; without this, DeepSpeed loads torch's compiler all the same, for seconds and 40 MiB.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_accelerator() -> bool:
    """Tells DeepSpeed to compute on the CPU where there is no GPU, before it is loaded, or Transformers loads it. True
    for a GPU.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    return on_gpu


def prepare(threads: int) -> None:
    """Sets up torch and DeepSpeed for one rank; once a process. `threads` as in the settings.

    Under `torchrun` its variables are used; otherwise the process is a group of one, without any port. Raises
    `errors.FailedPrecondition` for more than one rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise errors.FailedPrecondition(
            f"WORLD_SIZE is {world_size}, but the trainer runs as one rank.", remedy="Use torchrun --nproc-per-node 1."
        )
    import torch
    import torch.distributed
    from torch.utils import deterministic

    on_gpu = choose_accelerator()
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    # Filling fresh memory costs time and changes nothing where all of it is written before it is read.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # missing in its stub
    # Training checkpoints are hashed; a checksum inside them as well would double the time to write one.
    torch.serialization.set_crc32_options(False)
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public, but its stub does not say so
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    # DeepSpeed looks for these even where the group exists.
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    _quiet_deepspeed()
    quiet_transformers()


def quiet_transformers() -> None:
    """Keeps progress bars and reports on weights that are new by design out of the log."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _quiet_deepspeed() -> None:
    import deepspeed
    from deepspeed.utils import logger

    # Compiled at first use, for a minute, with a compiler that may not be there; one rank has nobody to share with.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It writes to standard output, in a format of its own.
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)


def free_memory() -> None:
    """Gives memory that is not referenced any more back to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
