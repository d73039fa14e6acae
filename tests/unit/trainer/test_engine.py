"""A step of the optimizer is AdamW's on fp32 master weights, however it is reached."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer import runtime
from trainer.config import TrainerSettings
from trainer.engine import MASTER, Engine
from trainer.losses.base import ParameterGroup

pytestmark = pytest.mark.usefixtures("one_rank")

RATE = 0.01


def model() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(8, 4, dtype=torch.bfloat16).to(runtime.device())


def loss(made: torch.nn.Linear, given: Tensor, by: float) -> Tensor:
    found: Tensor = made(given).float().square().sum() * by
    return found


def step(engine: Engine, given: Tensor, *scales: float) -> float:
    with engine.accumulating():
        for by in scales:
            engine.backward(engine.call(loss, given.to(engine.device), by))
    return engine.step([RATE])


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["not clipped", "clipped"])
def test_steps_are_those_of_plain_torch(scale: float) -> None:
    settings, mine, plain = TrainerSettings(max_grad_norm=1.0, weight_decay=0.1), model(), model()
    engine = Engine(mine, [ParameterGroup(list(mine.parameters()), RATE)], settings)
    masters = [parameter.detach().float() for parameter in plain.parameters()]
    adam = torch.optim.AdamW(
        masters, RATE, (settings.adam_beta1, settings.adam_beta2), settings.adam_epsilon, settings.weight_decay
    )
    for number in range(3):
        given = torch.randn(5, 8, generator=torch.Generator().manual_seed(number)).bfloat16().to(runtime.device())
        norm = step(engine, given, scale, 2 * scale)
        sums = [torch.zeros_like(master) for master in masters]
        for by in (scale, 2 * scale):
            parts = torch.autograd.grad(loss(plain, given, by), list(plain.parameters()))
            for total, part in zip(sums, parts, strict=True):
                total += part
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(masters, 1.0)), rel=1e-6)
        adam.step()
        for parameter, master in zip(plain.parameters(), masters, strict=True):
            parameter.data.copy_(master)
        kept = {fragment.name: fragment.tensors[MASTER] for fragment in engine.fragments()}
        for (name, parameter), other, master in zip(mine.named_parameters(), plain.parameters(), masters, strict=True):
            torch.testing.assert_close(kept[name].view_as(master), master, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(parameter, other, rtol=0.0, atol=0.0)
    assert engine.optimizer_steps == 3
    engine.close()


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    made = model()
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    engine = Engine(made, [ParameterGroup(list(made.parameters()), RATE)], TrainerSettings())
    assert not math.isfinite(step(engine, torch.ones(2, 8, dtype=torch.bfloat16), math.nan))
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())
    assert engine.optimizer_steps == 0
    assert math.isfinite(step(engine, torch.ones(2, 8, dtype=torch.bfloat16), 1.0))
    assert not torch.equal(made.weight, before["weight"])
    engine.close()
