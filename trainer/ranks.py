"""What the ranks of a trainer tell each other, apart from gradients. With one rank nothing is sent.

Every rank has to call the same of these, in the same order. Messages are JSON: nothing is pickled.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def count() -> int:
    """How many there are."""
    return dist.get_world_size()


def rank() -> int:
    """Which this is."""
    return dist.get_rank()


def lead() -> bool:
    """Whether this is the one that talks to the world."""
    return rank() == 0


def gather(message: Any) -> list[Any]:
    """The messages of all ranks, in their order, as JSON keeps them."""
    if count() == 1:
        return [message]
    mine = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(mine)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def from_lead(message: Any = None) -> Any:
    """The message of rank 0, as JSON keeps it; that of the others does not matter."""
    if count() == 1:
        return message
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8) if lead() else torch.empty(0)
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0)
    if not lead():
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(data.numpy().tobytes())


def any_of(flag: bool) -> bool:
    """Whether it is true on any of them."""
    if count() == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def add(values: Tensor) -> None:
    """Replaces values on the CPU by their sum over all ranks."""
    if count() > 1:
        dist.all_reduce(values)
