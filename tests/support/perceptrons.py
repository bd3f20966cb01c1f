"""States of two perceptrons in float64, without batch norm, and their gradients."""

from __future__ import annotations

import torch
from torch import nn

from mpl_scale.config.schema import FeedbackConfig, MethodConfig, OptimConfig, UDAConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.mesh import build_mesh
from mpl_scale.models.passes import Passes
from mpl_scale.mpl import METHODS, Baseline, Schedules, State
from mpl_scale.types import Batch

CLASSES, FEATURES = 3, 4

CPU = torch.device("cpu")


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    module.passes = Passes()
    return module


def network(seed: int) -> FlatNetwork:
    """Plain gradient descent: theta' = theta - lr g, as appendix A derives."""
    optim = OptimConfig(lr=1.0, momentum=0.0, nesterov=False)
    return FlatNetwork(mlp(seed), optim=optim, mesh=build_mesh(device=CPU))


def make_batch(labelled: int = 5, unlabelled: int = 4, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x_l, x_u = (torch.randn(n, FEATURES, generator=g, dtype=torch.float64) for n in (labelled, unlabelled))
    y_l = torch.randint(0, CLASSES, (labelled,), generator=g)
    return Batch(x_l, y_l, torch.arange(labelled), x_u, x_u, torch.arange(unlabelled))


def make_state(
    rule: str, *, lr: float = 0.1, teacher_lr: float = 0.0, forward_mode: bool = True, **method: object
) -> State:
    """Feedback only: no supervised or UDA loss, no baseline, unless asked for."""
    settings = {
        "feedback": FeedbackConfig(rule=rule, baseline=False),
        "supervised_weight": 0.0,
        "uda": UDAConfig(weight=0.0),
        "student_sees_labelled": False,
        **method,
    }
    one = torch.ones(1000)
    return State(
        method=MethodConfig(**settings),
        seed=0,
        schedules=Schedules(teacher_lr * one, lr * one, 0 * one, one),
        step=torch.zeros((), dtype=torch.int64),
        teacher=network(1),
        student=network(2),
        student_average=None,
        baseline=Baseline(decay=0.99, bias_correction=True, device=CPU),
        forward_mode=forward_mode,
    )


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def gradient(module: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Of a loss whose graph may be used again."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)])


def teacher_gradient(state: State, batch: Batch) -> torch.Tensor:
    """What one step moves the teacher by, per unit of its learning rate."""
    state.schedules.teacher_lr.fill_(1.0)
    before = flat(state.teacher.module)
    METHODS["mpl"].step(state, batch)
    return before - flat(state.teacher.module)
