"""Algorithm 1 in plain PyTorch: one process, the whole global batch, torch's own BatchNorm, SGD and autograd.

Independent of the package but for the counter-based numbers that draw pseudo labels and masks of dropout. Equality of
the sharded step with this file is what "correct" means in the tests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpl_scale.philox import uniform
from tests.support.masks import drop_nothing, give_masks

WEAK, STRONG = 1 << 28, 2 << 28
"""Where the numbers of rows of x_u and x_s begin."""


class OddNet(nn.Module):
    """A small CNN whose parameter counts divide by nothing, so that shards need padding and cut through tensors."""

    def __init__(self, width: int = 5, classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width + 1, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width + 1)
        self.classifier = nn.Linear(2 * width + 1, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.classifier(x.mean((2, 3)))


Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    labelled: int = 8
    unlabelled: int = 16
    classes: int = 7
    size: int = 6
    lr: float = 0.125  # exact in float32, as the schedules are
    momentum: float = 0.9
    weight_decay: float = 1e-3
    bn_decay: float = 0.9
    bn_eps: float = 1e-3
    smoothing: float = 0.1
    uda_weight: float = 0.5
    temperature: float = 0.7
    threshold: float = 0.2
    baseline_decay: float = 0.9
    ema_decay: float = 0.9
    clip: float = 0.0
    seed: int = 3
    micro_batches: int = 1
    ranks: int = 1  # whose rows make up a micro-batch
    deferred: bool = False  # of no effect on the result
    rule: str = "cosine"  # or per_sample, or soft_exact with soft labels
    frozen: tuple[str, ...] = ()  # modules of both networks
    normalise: str = "norms"  # or credits, with soft_exact
    model: str = ""  # timm's name of both networks; "": OddNet
    kwargs: tuple[tuple[str, Any], ...] = ()  # of that model
    drop_path: float = 0.0  # likewise


@dataclass
class Trace:
    """What the sharded run must reproduce."""

    teacher: dict[str, torch.Tensor] = field(default_factory=dict)
    student: dict[str, torch.Tensor] = field(default_factory=dict)
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    baseline: float = 0.0


def make_batches(s: Settings, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """(x_l, y_l, x_u, x_s) of every step: the global batches."""
    generator = torch.Generator().manual_seed(s.seed)
    shape = (3, s.size, s.size)
    batches = []
    for _ in range(s.steps):
        x_l = torch.randn(s.labelled, *shape, generator=generator, dtype=torch.float64)
        y_l = torch.randint(0, s.classes, (s.labelled,), generator=generator)
        x_u = torch.randn(s.unlabelled, *shape, generator=generator, dtype=torch.float64)
        x_s = x_u + 0.3 * torch.randn(s.unlabelled, *shape, generator=generator, dtype=torch.float64)
        batches.append((x_l.to(dtype), y_l, x_u.to(dtype), x_s.to(dtype)))
    return batches


def make_net(seed: int, dtype: torch.dtype, s: Settings, width: int) -> nn.Module:
    """width: of an OddNet."""
    torch.manual_seed(seed)
    if s.model:
        import timm

        kwargs = {**dict(s.kwargs), "drop_path_rate": s.drop_path}
        return timm.create_model(s.model, num_classes=s.classes, **kwargs).to(dtype).train()
    net = OddNet(width, s.classes).to(dtype).train()
    for layer in (net.bn1, net.bn2):
        layer.momentum, layer.eps = 1 - s.bn_decay, s.bn_eps
    return net


def freeze(net: nn.Module, s: Settings) -> nn.Module:
    """Keep every gradient of some modules at zero, and their batch norms at their averages."""
    for layer in map(net.get_submodule, s.frozen):
        layer.eval()
        for parameter in layer.parameters():
            parameter.frozen = True  # type: ignore[attr-defined]
    return net


def frozen_forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Training-mode forward that leaves BN's moving averages as they were."""
    return torch.func.functional_call(net, {k: v.clone() for k, v in net.named_buffers()}, (x,))


def derivative_along(net: nn.Module, direction: torch.Tensor, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The derivative of the first rows' log-probabilities along a flat direction in the weights, by double backward."""
    weights, buffers = dict(net.named_parameters()), {k: v.clone() for k, v in net.named_buffers()}
    pieces = direction.split([w.numel() for w in weights.values()])
    along = tuple(piece.view_as(w) for piece, w in zip(pieces, weights.values(), strict=True))

    def log_probabilities(*values: torch.Tensor) -> torch.Tensor:
        whole = {**dict(zip(weights, values, strict=True)), **{k: v.clone() for k, v in buffers.items()}}
        return torch.func.functional_call(net, whole, (x,))[:rows].log_softmax(-1)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
        return torch.autograd.functional.jvp(log_probabilities, tuple(weights.values()), along)[1].detach()


def flat_gradient(net: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    weights = list(net.parameters())
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    return torch.cat([g.flatten() * (not hasattr(w, "frozen")) for g, w in zip(gradients, weights, strict=True)])


def apply_gradient(net: nn.Module, optimizer: torch.optim.Optimizer, gradient: torch.Tensor, clip: float) -> None:
    for parameter, piece in zip(net.parameters(), gradient.split([p.numel() for p in net.parameters()]), strict=True):
        parameter.grad = piece.view_as(parameter).clone()
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def sgd(net: nn.Module, s: Settings) -> torch.optim.SGD:
    decayed = [p for p in net.parameters() if p.ndim > 1 and not hasattr(p, "frozen")]
    exempt = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum, nesterov=True)


def micro_batch(count: int, s: Settings, index: int) -> torch.Tensor:
    """The rows of micro-batch `index`: as many from each rank's consecutive rows."""
    return torch.arange(count).view(s.ranks, s.micro_batches, -1)[:, index].flatten()


def fed_back_loss(s: Settings, credit: torch.Tensor, z_u: torch.Tensor, y_u: torch.Tensor) -> torch.Tensor:
    if s.rule == "soft_exact":
        return (z_u.softmax(-1) * credit).sum(-1).mean()
    return (credit * F.cross_entropy(z_u, y_u, reduction="none")).mean()


def teacher_gradient(  # every micro-batch is normalised by itself; their losses are averaged
    teacher: nn.Module,
    s: Settings,
    credits: list[torch.Tensor],
    parts: list[tuple[torch.Tensor, ...]],
    views: list[Views],
) -> torch.Tensor:
    total = torch.zeros((), dtype=views[0][0].dtype)
    for (_, y_l, _, _, y_u), (z_l, z_u, z_s), credit in zip(parts, views, credits, strict=True):
        target = (z_u.detach() / s.temperature).softmax(-1)
        mask = (target.max(-1).values >= s.threshold).to(z_u.dtype)
        uda = (-(target * z_s.log_softmax(-1)).sum(-1) * mask).mean()
        supervised = F.cross_entropy(z_l, y_l, label_smoothing=s.smoothing)
        loss = fed_back_loss(s, credit, z_u, y_u) + supervised + s.uda_weight * uda
        total = total + flat_gradient(teacher, loss) / s.micro_batches
    return total


def run_reference(s: Settings, dtype: torch.dtype) -> Trace:
    teacher, student = (freeze(make_net(seed, dtype, s, width), s) for seed, width in ((1, 6), (2, 5)))
    teacher_sgd, student_sgd = sgd(teacher, s), sgd(student, s)
    average = {k: v.clone() for k, v in student.state_dict().items()}
    trace, b = Trace(), 0.0
    for t, (x_l, y_l, x_u, x_s) in enumerate(make_batches(s, dtype)):
        views: list[Views] = []
        parts: list[tuple[torch.Tensor, ...]] = []
        rows: list[torch.Tensor] = []  # of the student's pass
        for index in range(s.micro_batches):
            of_l, of_u = micro_batch(s.labelled, s, index), micro_batch(s.unlabelled, s, index)
            sizes = [len(of_l), len(of_u), len(of_u)]
            give_masks(teacher, seed=s.seed, stream=0, step=t, rows=torch.cat([of_l, of_u + WEAK, of_u + STRONG]))
            z_l, z_u, z_s = teacher(torch.cat([x_l[of_l], x_u[of_u], x_s[of_u]])).split(sizes)
            u = uniform(seed=s.seed, stream=3 << 16, step=torch.tensor(t), rows=of_u + WEAK, columns=s.classes)
            y_u = (z_u.detach().log_softmax(-1) - torch.log(-torch.log(u))).argmax(-1)
            y_u = z_u.detach().softmax(-1) if s.rule == "soft_exact" else y_u
            views.append((z_l, z_u, z_s))
            parts.append((x_l[of_l], y_l[of_l], x_u[of_u], x_s[of_u], y_u))
            rows.append(torch.cat([of_u + STRONG, of_l]))

        g_u = g_l = torch.zeros((), dtype=dtype)
        for (part_l, _, _, part_s, y_u), seen in zip(parts, rows, strict=True):
            give_masks(student, seed=s.seed, stream=1, step=t, rows=seen)
            loss = F.cross_entropy(student(torch.cat([part_s, part_l]))[: len(part_s)], y_u)
            g_u = g_u + flat_gradient(student, loss) / s.micro_batches
        before = copy.deepcopy(student)
        apply_gradient(student, student_sgd, g_u, s.clip)
        drop_nothing(student)
        for part_l, part_y, *_ in parts:
            loss = F.cross_entropy(frozen_forward(student, part_l), part_y)
            g_l = g_l + flat_gradient(student, loss) / s.micro_batches
        cosine = (torch.dot(g_u.double(), g_l.double()) / g_u.double().norm() / g_l.double().norm()).item()
        b = s.baseline_decay * b + (1 - s.baseline_decay) * cosine
        offset = b / (1 - s.baseline_decay ** (t + 1))
        credits = [torch.tensor(cosine - offset, dtype=dtype) for _ in parts]
        if s.rule != "cosine":
            norms = g_u.double().norm() * g_l.double().norm()
            along = []
            for (part_l, _, _, part_s, _), seen in zip(parts, rows, strict=True):
                give_masks(before, seed=s.seed, stream=1, step=t, rows=seen)
                along.append(derivative_along(before, g_l, torch.cat([part_s, part_l]), len(part_s)) / norms)
            credits = along
        if s.normalise == "credits":
            labelled = [(part[-1], d) for d, part in zip(along, parts, strict=True)]
            spreads = [(y * d.square()).sum(-1) - (y * d).sum(-1).square() for y, d in labelled]
            credits = [d / torch.cat(spreads).mean().sqrt() for d in along]
        if s.rule == "per_sample":
            picked = [d.gather(1, part[-1][:, None])[:, 0] for d, part in zip(along, parts, strict=True)]
            credits = [-row - offset for row in picked]

        apply_gradient(teacher, teacher_sgd, teacher_gradient(teacher, s, credits, parts, views), s.clip)

        rate = min(s.ema_decay, (t + 1) / (t + 10))
        for name, value in student.state_dict().items():
            mixed = rate * average[name] + (1 - rate) * value if value.is_floating_point() else value.clone()
            average[name] = mixed
        trace.cosines.append(cosine)
    trace.teacher = {k: v.clone() for k, v in teacher.state_dict().items()}
    trace.student = {k: v.clone() for k, v in student.state_dict().items()}
    trace.average, trace.baseline = average, b
    return trace
