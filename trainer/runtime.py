"""What has to be set in a process before and after its heavy libraries are loaded."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_RANK_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other before they give up."""

_PASS_TOKENS = {"cpu": 1024, "cuda": 4096}
"""A GPU that gets no more than suits a CPU is idle most of the time: an H100 learnt three times as many pairs a second,
of a model of 135M, with four times as many tokens.
"""


class Stopped(Exception):
    """The process was asked to stop while it learnt. What was begun is given up; nothing of it is kept."""


def before_imports(*, beside_servers: bool = False) -> None:
    """Settings that libraries read when they are loaded. To be called before torch is imported. `beside_servers`: for a
    process that computes for as long as servers do, on the same cores where these have none of their own.
    """
    if beside_servers:
        # Threads that wait must sleep: left to the libraries' default, they spin, which takes up to half of an engine's
        # speed, and makes our steps a third longer, as they wait for a thread without a core. A process that is alone
        # is a fifth faster with that default.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing here is compiled; without this, DeepSpeed loads torch's compiler all the same, for seconds and 40 MiB.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def is_lead() -> bool:
    """Whether this process is rank 0, or the only one; known before anything is set up."""
    return os.environ.get("RANK", "0") == "0"


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
    """Sets up torch and DeepSpeed for this rank; once a process. `threads` as in the settings.

    Under `torchrun` its variables are used; otherwise the process is a group of one, without any port.
    """
    import torch
    import torch.distributed
    from torch.utils import deterministic

    on_gpu = choose_accelerator()
    torch.set_num_threads(_threads(threads, on_gpu))
    # Not just with a warning: attention on a GPU then chooses a kernel whose gradients differ from run to run.
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time and changes nothing where all of it is written before it is read.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # missing in its stub
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            torch.distributed.init_process_group(backend, timeout=_RANK_TIMEOUT)
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
    # What the libraries made is there for good: `free_memory` need not look through it each time.
    gc.collect()
    gc.freeze()


def _threads(wanted: int, on_gpu: bool) -> int:
    """Threads of this rank. Ranks that share a machine's cores get some of their own, which they stay on."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local == 1 or on_gpu:
        return wanted or torch.get_num_threads()
    cores, rank = sorted(os.sched_getaffinity(0)), int(os.environ["LOCAL_RANK"])
    mine = cores[rank * len(cores) // local : (rank + 1) * len(cores) // local] or cores
    os.sched_setaffinity(0, mine)
    return wanted or len(mine)


def device() -> torch.device:
    """Where this rank computes."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pass_tokens(given: int) -> int:
    """Tokens of a forward and backward pass, of which `micro_batch_tokens` is the setting."""
    return given or _PASS_TOKENS[device().type]


def quiet_transformers() -> None:
    """Keeps progress bars and reports on weights that are new by design out of the log."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _quiet_deepspeed() -> None:
    import deepspeed
    from deepspeed.utils import logger

    # Compiled at first use, for a minute, with a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls what torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.[a-z_]+` is deprecated", FutureWarning)
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
