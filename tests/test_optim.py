"""Optimisers against torch's and timm's, schedules against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from mpl_scale.config.schema import OptimConfig
from mpl_scale.optim import build_optimizer, parameter_groups, schedule
from mpl_scale.types import Slice


def two_copies() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    second.load_state_dict(first.state_dict())
    return first, second


def train(module: nn.Module, optimizer: torch.optim.Optimizer | Both, lrs: list[float], *, tensor_lr: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
        optimizer.zero_grad()
        x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
        module(x).square().mean().backward()
        optimizer.step()


def compare(
    config: OptimConfig,
    reference: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    *,
    rtol: float,
    atol: float,
    rates: Sequence[float] = (1.0, 0.5, 2.0),
) -> None:
    """Updates at `rates` times lr by ours and by the optimiser that `reference` makes of the parameter groups."""
    ours, theirs = two_copies()
    decayed = [p for p in theirs.parameters() if config.decay_bn_and_bias or p.ndim > 1]
    exempt = [p for p in theirs.parameters() if not (config.decay_bn_and_bias or p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": 0.01}, *([{"params": exempt, "weight_decay": 0.0}] if exempt else [])]
    lrs = [config.lr * rate for rate in rates]
    optimizer = build_optimizer(parameter_groups(ours, config), config)
    layout = [Slice(n, tuple(p.shape), 0, p.numel(), i, 0) for i, (n, p) in enumerate(ours.named_parameters())]
    optimizer.bind(list(ours.parameters()), layout, group=None)
    train(ours, optimizer, lrs, tensor_lr=True)
    train(theirs, reference(groups), lrs, tensor_lr=False)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay_all", [True, False])
def test_sgd_is_torchs(nesterov: bool, decay_all: bool) -> None:
    config = OptimConfig(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01, decay_bn_and_bias=decay_all)

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)

    compare(config, sgd, rtol=1e-13, atol=1e-15)


def test_rmsprop_is_timms_tensorflow_variant() -> None:
    from timm.optim import RMSpropTF

    config = OptimConfig(name="rmsprop", lr=0.01, momentum=0.9, rho=0.9, eps=1e-3, weight_decay=0.01)

    def rmsprop(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return RMSpropTF(groups, lr=0.01, alpha=0.9, eps=1e-3, momentum=0.9, lr_in_momentum=True)

    compare(config, rmsprop, rtol=1e-12, atol=1e-14)


def test_adamw_is_torchs() -> None:
    """Twenty steps at changing rates, without decay of batch norm and biases."""
    config = OptimConfig(name="adamw", lr=0.01, betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.01)

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)

    # The bias before batch norm has rounding errors of 1e-17 for a gradient, which the rule divides by 1e-6.
    compare(config, adamw, rtol=1e-12, atol=1e-11, rates=[0.0, 1.0, *(1.0 + (s % 5) / 4 for s in range(18))])


def test_lamb_is_timms() -> None:
    """Twenty steps; without decay of batch norm and biases, whose ratio is then 1, and with."""
    from timm.optim import Lamb

    for decay_all in (False, True):
        # A larger eps: the bias before batch norm has rounding errors for a gradient, and their norm would decide.
        config = OptimConfig(name="lamb", lr=0.01, adam_eps=1e-3, weight_decay=0.01, decay_bn_and_bias=decay_all)

        def lamb(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return Lamb(groups, lr=0.01, eps=1e-3, max_grad_norm=None)

        compare(config, lamb, rtol=1e-12, atol=1e-12, rates=[0.0, 1.0, *(1.0 + (s % 5) / 4 for s in range(18))])


class Both:
    """Two optimisers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov: bool) -> None:
    """The linear layer's matrix by torch's Muon, the first layer and the vectors by its AdamW."""
    config = OptimConfig(name="muon", lr=0.01, momentum=0.9, nesterov=nesterov, adam_eps=1e-6, weight_decay=0.01)

    def muon(groups: list[dict[str, Any]]) -> Any:
        first, matrix = groups[0]["params"]
        others = [{**groups[0], "params": [first]}, groups[1]]
        settings = {"momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
        return Both(
            torch.optim.Muon([{**groups[0], "params": [matrix]}], **settings),  # type: ignore[arg-type]
            torch.optim.AdamW(others, betas=config.betas, eps=1e-6),
        )

    # The bias before batch norm, as for AdamW. Momentum is rounded to bf16 alike, unless it lies between two values.
    compare(config, muon, rtol=1e-12, atol=1e-10, rates=[0.0, 1.0, *(1.0 + (s % 5) / 4 for s in range(8))])


def test_schedules() -> None:
    """0 while waiting, then linear warm-up, then the decay: the released code's rule."""
    cosine = schedule(OptimConfig(lr=0.4, warmup_steps=10), steps=110, wait=20).tolist()
    assert cosine[:20] == [0.0] * 20
    assert cosine[20:30] == pytest.approx([0.4 * (s + 1) / 10 for s in range(10)])
    assert cosine[30:] == pytest.approx([0.2 * (1 + math.cos(math.pi * s / 80)) for s in range(80)])
    config = OptimConfig(lr=0.1, schedule="exponential", decay_rate=0.97, decay_steps=3)
    assert schedule(config, steps=9).tolist() == pytest.approx([0.1 * 0.97 ** (s // 3) for s in range(9)])
    assert schedule(OptimConfig(lr=1e-5, schedule="constant"), steps=4).tolist() == pytest.approx([1e-5] * 4)


def torchs(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


LR = 0.4
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = {
    "cosine": ({"min_lr": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 90, eta_min=0.1)),
    "linear": ({"min_lr": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, 90)),
    "exponential": ({"decay_rate": 0.9, "decay_steps": 7}, lambda o: lr_scheduler.StepLR(o, 7, 0.9)),
    "step": ({"decay_rate": 0.1, "milestones": [20, 50]}, lambda o: lr_scheduler.MultiStepLR(o, [10, 40], 0.1)),
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs_after_the_warm_up(name: str) -> None:
    settings, make = SCHEDULES[name]
    rates = schedule(OptimConfig(lr=LR, schedule=name, warmup_steps=10, **settings), steps=105, wait=5).tolist()
    assert rates[:5] == [0.0] * 5
    assert rates[5:15] == pytest.approx([LR * (s + 1) / 10 for s in range(10)])
    assert rates[15:] == pytest.approx(torchs(make, 90, LR), rel=1e-6)  # stored in float32


def test_one_cycle_is_torchs() -> None:
    config = OptimConfig(lr=LR, schedule="one_cycle", warmup_steps=30, min_lr=LR * 0.04 / 100)

    def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(
            optimizer, LR, total_steps=101, pct_start=30 / 101, final_div_factor=100, cycle_momentum=False
        )

    rates = schedule(config, steps=101 + 4, wait=4).tolist()
    assert rates[:4] == [0.0] * 4
    assert rates[4:] == pytest.approx([*torchs(one_cycle, 100, LR), config.min_lr], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"min_lr": 0.5}, "min_lr = 0.5"),
        ({"min_lr": 0.1, "schedule": "constant"}, "min_lr = 0.1"),
        ({"schedule": "step"}, "milestones = "),
        ({"schedule": "step", "milestones": [5, 4]}, "milestones = "),
        ({"milestones": [5]}, "milestones = "),
        ({"schedule": "one_cycle"}, "warmup_steps = 0"),
    ],
)
def test_settings_of_another_schedule_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OptimConfig(lr=LR, **settings)
