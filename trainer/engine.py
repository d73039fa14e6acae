"""DeepSpeed as the learner uses it: ZeRO 0 to 3 on any number of ranks, bf16 weights with fp32 master weights.

    micro-batches ─▶ gradients, added up in fp32 on each rank ─▶ reduced once ─▶ clipped ─▶ AdamW ─▶ bf16 weights

Autograd itself adds up in fp32, into the `.grad` of every parameter, and ranks exchange the sum once a step. Only with
stage 3, where no rank is to hold all gradients, are those of each micro-batch reduced at once, into fp32 shards.

Whatever the stage, what a rank keeps of the optimizer is a list of `Fragment`: which part of which parameter, and views
of its master weights and moments. Training checkpoints are written and read by them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed
from torch import Tensor

from trainer.config import LearningSettings
from trainer.losses.base import ParameterGroup

T = TypeVar("T")

_EPSILON = 1e-6  # as PyTorch and DeepSpeed add to the norm
MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter that this rank updates."""

    name: str
    """The parameter's."""
    start: int
    """Where the part begins in the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """Master weights and moments: [N] float32 views of what the optimizer works on, by their names."""

    @property
    def size(self) -> int:
        """N."""
        return self.tensors[MASTER].numel()


class _Place(NamedTuple):
    """Where a fragment's master weights lie."""

    name: str
    start: int
    flat: Tensor
    """Of the optimizer's parameters, the one that they are in."""
    offset: int
    size: int


class _Anything(torch.nn.Module):
    """A model, of which `forward` asks whatever it is told to: DeepSpeed wants to hear of every forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function` of the model and the arguments."""
        return function(self.model, *arguments)


class Engine:
    """A model and its optimizer. With several ranks, all methods but `fragments` are to be called by all of them."""

    def __init__(self, model: Any, groups: Sequence[ParameterGroup], settings: LearningSettings) -> None:
        self.ranks = torch.distributed.get_world_size()
        # With one rank there is nothing to divide, and stage 0 is the fastest; but it cannot offload.
        self.stage = settings.zero_stage if self.ranks > 1 or settings.cpu_offload else 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            # At the rate 0 nothing moves when DeepSpeed takes a step to have all of its state; rates come with `step`.
            [{"params": [p for p in group.parameters if p.requires_grad], "lr": 0.0} for group in groups],
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,  # no temporaries of the size of the model
        )
        self._engine, *_ = deepspeed.initialize(
            model=_Anything(model), optimizer=optimizer, config=_config(settings, self.stage)
        )
        if self.stage == 0:
            self._engine.enable_backward_allreduce = self.ranks > 1  # alone it would copy all gradients for nothing
            self._engine.optimizer.step = _stepping(self._engine.optimizer)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        for state in self._state.values():
            state["step"].zero_()
        if self.stage < 3:
            for parameter in self._parameters.values():
                parameter.grad_dtype = torch.float32
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._engine.device
        return device

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function` of the model and the arguments, as a forward pass."""
        found: T = self._engine(function, *arguments)
        return found

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`; to be called within `accumulating`. That of a step is the sum of those of all
        micro-batches of all ranks.
        """
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)  # DeepSpeed takes the mean over ranks

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """All micro-batches of a step are within it. At its end ranks exchange their sums."""
        if self.stage in (1, 2):
            with self._engine.coalesce_grad_reduction():
                yield
                self._fill_gradients()
        else:
            yield
            if self.stage == 0:
                self._fill_gradients()

    def step(self, rates: Sequence[float]) -> float:
        """A step of the optimizer, with a learning rate for each group. Returns the gradient's norm before clipping."""
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def fragments(self) -> list[Fragment]:
        """What this rank keeps of master weights and moments. Together the ranks have everything, once; with stage 0
        each has all of it.
        """
        return [
            Fragment(
                place.name,
                place.start,
                {
                    name: tensor.detach().view(-1).narrow(0, place.offset, place.size)
                    for name, tensor in ((MASTER, place.flat), *((m, self._moment(place.flat, m)) for m in MOMENTS))
                },
            )
            for place in self._places()
        ]

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has counted, for its bias correction."""
        return max((int(state["step"]) for state in self._state.values() if "step" in state), default=0)

    def restored(self, optimizer_steps: int) -> None:
        """To be called when all fragments have been filled: counts steps from there, and makes the weights of them."""
        for place in self._places():
            self._moment(place.flat, MOMENTS[0])
            self._state[place.flat]["step"].fill_(optimizer_steps)
        optimizer = self._engine.optimizer
        if self.stage == 0:
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)
        elif self.stage == 3:
            for weights, masters in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                weights.data.copy_(masters.data)
        else:
            optimizer.update_lp_params()

    @contextlib.contextmanager
    def gathered(self, name: str) -> Iterator[Tensor]:
        """The whole of a parameter, in bf16."""
        parameter = self._parameters[name] if name in self._parameters else self.model.get_parameter(name)
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield parameter.detach()
        else:
            yield parameter.detach()

    def close(self) -> None:
        """Lets go of everything."""
        self._engine.destroy()
        # Its hooks and its model refer to each other; without this the weights live on until some later collection.
        self._engine.optimizer = None
        self._engine.module = None
        self._engine = self.model = None
        self._parameters.clear()

    @property
    def _state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        found: Mapping[Tensor, dict[str, Tensor]] = self._engine.optimizer.optimizer.state
        return found

    def _moment(self, flat: Tensor, name: str) -> Tensor:
        """A moment of one of the optimizer's parameters; zeros, where it has made no step yet."""
        state = self._state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat.data)
        return state[name]

    def _places(self) -> Iterator[_Place]:
        optimizer = self._engine.optimizer
        if self.stage == 0:
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    yield _Place(self._names[id(weight)], 0, master, 0, master.numel())
        elif self.stage == 3:
            rank = torch.distributed.get_rank()
            for name, parameter in self._parameters.items():
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = rank * size
                if start < parameter.ds_numel:
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    yield _Place(name, start, flat, offset, min(size, parameter.ds_numel - start))
        else:
            for name, parameter in self._parameters.items():
                if (part := parameter._hp_mapping) is not None:
                    flat = optimizer.single_partition_of_fp32_groups[part.param_group_index]
                    lp, hp = part.lp_fragment_address, part.hp_fragment_address
                    yield _Place(name, lp.start, flat, hp.start, hp.numel)

    def _fill_gradients(self) -> None:
        # A parameter that this rank has no gradient for may have one on another, and the exchange is of all.
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def _stepping(optimizer: Any) -> Callable[[], bool]:
    """A step for DeepSpeed's optimizer of stage 0, in place of its own, which reads the gradients three times more than
    need be, and rounds them to bf16 before it takes their norm. Tells whether that is no number; nothing moves then.
    """
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    masters = [master for group in optimizer.fp32_groups for master in group]

    @torch.no_grad()
    def step() -> bool:
        gradients = [weight.grad for weight in weights]
        norm = optimizer._global_grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            skipped: bool = optimizer._skip_invalid_grad_norm()
            return skipped
        optimizer.overflow = False
        if optimizer.clip_grad and (scale := optimizer.clip_grad / (norm + _EPSILON)) < 1.0:
            torch._foreach_mul_(gradients, scale)
        for weight, master, gradient in zip(weights, masters, gradients, strict=True):
            weight.grad, master.grad = None, gradient
        optimizer.optimizer.step()
        for master in masters:
            master.grad = None
        torch._foreach_copy_(weights, masters)
        return False

    return step


def _config(settings: LearningSettings, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if settings.cpu_offload and stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # Micro-batches differ in size and number, so the end of a step is ours to say.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": stage in (1, 2),  # `coalesce_grad_reduction` wants it
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16" if stage < 2 else "fp32"},  # `grad_dtype` decides below stage 3
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
