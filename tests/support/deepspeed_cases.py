"""Configurations of DeepSpeedNetwork, a small network with odd sizes, and the same training in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.config.schema import OptimConfig
from mpl_scale.engine.deepspeed_engine import DeepSpeedNetwork
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.optim import build_optimizer, parameter_groups

CPU = torch.device("cpu")

ROWS = 8
"""Rows of the global batch."""

SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)

RMSPROP = OptimConfig(name="rmsprop", lr=0.01, momentum=0.9, weight_decay=1e-2)

ADAMW = OptimConfig(name="adamw", lr=0.01, betas=(0.8, 0.95), weight_decay=0.5)


@dataclass(frozen=True)
class Case:
    """One configuration of an engine."""

    stage: int
    bf16: bool = False
    clip: float = 0.0
    optim: OptimConfig = SGD
    shard_size: int | None = None
    frozen: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)

    def ds_config(self) -> dict[str, Any]:
        """Small buckets and no persistent parameters, so that every collective of a big network happens."""
        zero = {
            "stage": self.stage,
            "reduce_bucket_size": 100,
            "allgather_bucket_size": 100,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 100,
        }
        return {
            "train_batch_size": ROWS,
            "gradient_clipping": self.clip,
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {**zero, **self.zero},
            **self.top,
        }


class Net(nn.Module):
    """Odd sizes, so that every shard needs padding, and a running statistic in a buffer."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.norm = nn.GroupNorm(1, width)
            self.conv = nn.Conv2d(width, 7, 3, stride=2, bias=False)
            self.head = nn.Linear(7, 5)
        self.register_buffer("mean", torch.zeros(width))
        self.use_norm = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.training and torch.is_grad_enabled():
            self.mean.lerp_(x.detach().float().mean((0, 2, 3)), 0.1)
        x = self.norm(x) if self.use_norm else x
        return self.head(F.relu(self.conv(F.relu(x))).mean((2, 3)))


def make_net(width: int, seed: int, case: Case) -> Net:
    """A network, with its middle frozen where the case says so."""
    net = Net(width, seed)
    net.conv.requires_grad_(not case.frozen)
    return net


class Reference:
    """mpl_scale.mpl.Network in plain PyTorch, one process, fp32 master weights."""

    dot_group = None

    def __init__(self, module: Net, case: Case) -> None:
        self.weights = copy.deepcopy(module)
        self.module = copy.deepcopy(module)
        if case.bf16:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.bfloat16()
        self.case = case
        self.optimizer = build_optimizer(parameter_groups(self.weights, case.optim), case.optim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images.to(self.module.stem.weight.dtype)).float()

    def accumulate(self, loss: torch.Tensor) -> None:
        self.module.zero_grad()
        loss.backward()

    def reduce(self) -> list[torch.Tensor]:
        for master, parameter in zip(self.weights.parameters(), self.module.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
        return [master.grad.flatten().clone() for master in self.weights.parameters()]

    def apply(self, lr: torch.Tensor) -> None:
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.weights.parameters(), self.case.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for master, parameter in zip(self.weights.parameters(), self.module.parameters(), strict=True):
            parameter.data.copy_(master.data)

    def discard(self) -> None:
        self.module.zero_grad()

    def refresh_weights(self) -> None:
        """The weights are never out of date."""

    def full(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """The master weights, or one optimiser state, by parameter."""
        named = self.weights.named_parameters()
        return {k: (p.detach() if name is None else self.optimizer.state[p][name]).flatten() for k, p in named}


def make_case(case: Case, seed: int = 0) -> tuple[Mesh, DeepSpeedNetwork, DeepSpeedNetwork]:
    """Mesh, teacher and student of this rank. Ranks start from different weights: rank 0's must win."""
    mesh = build_mesh(device=CPU, shard_size=case.shard_size)
    teacher, student = (
        DeepSpeedNetwork(
            make_net(width, seed + number + mesh.rank, case), optim=case.optim, ds_config=case.ds_config(), mesh=mesh
        )
        for width, number in ((5, 0), (3, 100))
    )
    return mesh, teacher, student


def gradient(network: Any, loss: torch.Tensor) -> Any:
    """Of one micro-batch, reduced."""
    network.accumulate(loss)
    return network.reduce()


def mpl_step(teacher: Any, student: Any, *, step: int, rows: slice, lr: float) -> torch.Tensor:
    """The calls of one MPL step, with a teacher graph alive over the student's, and passes without a backward.

    Returns g_u.g_l, g_u.g_u, g_l.g_l, float64 [3].
    """
    draw = torch.Generator().manual_seed(step)
    images, others = torch.randn(2, ROWS, 3, 6, 6, generator=draw)
    labels = torch.randint(5, (ROWS,), generator=draw)[rows]
    images, others = images[rows], others[rows]
    rate = torch.tensor(lr / (1 + step))

    logits = teacher.forward(images)
    with torch.no_grad():
        teacher.forward(others)
    first = gradient(student, F.cross_entropy(student.forward(images), logits.detach().softmax(-1)))
    student.apply(rate)
    with torch.no_grad():
        student.module.eval()
        student.forward(others)
        student.module.train()
    second = gradient(student, 3 * F.cross_entropy(student.forward(others), labels))
    student.discard()
    student.refresh_weights()  # changes nothing, in the middle of a step either
    dots = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(first, second, strict=True):
        a, b = a.double(), b.double()
        dots += torch.stack([a @ b, a @ a, b @ b])
    if student.dot_group is not None:
        dist.all_reduce(dots, group=student.dot_group)
    feedback = (dots[0] / (dots[1] * dots[2]).sqrt()).float()
    hard = logits.detach().argmax(-1)
    gradient(teacher, feedback * F.cross_entropy(logits, hard) + F.cross_entropy(logits, labels))
    teacher.apply(rate)
    return dots


def gather(network: DeepSpeedNetwork, name: str | None = None) -> dict[str, torch.Tensor]:
    """The full fp32 parameters, or one optimiser state, put together from the owners' slices, each element once."""
    shards = network.master if name is None else network.optimizer_state[name]
    mine = [
        (piece, shards[piece.shard][piece.offset : piece.offset + piece.length].clone()) for piece in network.layout
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine if network.owns_shard else [])
    full: dict[str, torch.Tensor] = {}
    covered: dict[str, torch.Tensor] = {}
    for piece, values in itertools.chain.from_iterable(everyone):
        elements = torch.Size(piece.shape).numel()
        part = slice(piece.start, piece.start + piece.length)
        full.setdefault(piece.name, torch.full((elements,), torch.nan))[part] = values
        covered.setdefault(piece.name, torch.zeros(elements))[part] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    return full


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference; both hold the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def local_rows(mesh: Mesh) -> slice:
    """This rank's rows of the global batch."""
    return slice(mesh.rank * ROWS // mesh.world, (mesh.rank + 1) * ROWS // mesh.world)


ACCUMULATE_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
