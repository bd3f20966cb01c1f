"""The one state object of the step: two networks, the student's moving average, the baseline, schedules, counters.

Every value that changes from step to step is a device tensor, updated in place, so that a captured step can be
replayed. Reading one on the host is the caller's business, outside the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist

from mpl_scale.config.schema import MethodConfig
from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.models.passes import Pass
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.noted import PseudoLabels
from mpl_scale.mpl.views import Logits, Seen, Views, three_views
from mpl_scale.types import StepMetrics

# The passes of a step, each with random numbers of its own.
TEACHER_PASS, STUDENT_PASS, FEEDBACK_PASS, LABEL_SAMPLING, MIXING = range(5)


@dataclass(frozen=True)
class Schedules:
    """Values by step, each float32 [N] (or [] for the current step, see `at`)."""

    teacher_lr: torch.Tensor
    student_lr: torch.Tensor
    uda_weight: torch.Tensor
    feedback_gate: torch.Tensor  # 0 while the student waits, then 1

    def at(self, step: torch.Tensor) -> Schedules:
        """The values at step (int64 []), read on the device; the last ones past the end."""
        index = step.clamp(max=len(self.teacher_lr) - 1)[None]  # int64 [1]
        return Schedules(**{f.name: getattr(self, f.name).index_select(0, index)[0] for f in fields(self)})


class Baseline:
    """Moving average b of h (C.3), divided by 1 - decay**t when bias-corrected; float64 on the device."""

    def __init__(self, *, decay: float, bias_correction: bool, device: torch.device) -> None:
        self.decay, self.bias_correction = decay, bias_correction
        self.average = torch.zeros((), dtype=torch.float64, device=device)  # []
        self.steps = torch.zeros((), dtype=torch.float64, device=device)  # []

    def update(self, h: torch.Tensor) -> torch.Tensor:
        """Take h [] in, return the average with it."""
        self.average.lerp_(h.double(), 1.0 - self.decay)
        self.steps.add_(1.0)
        return self.value()

    def value(self) -> torch.Tensor:
        """The current (corrected) average, float64 []; 0 before the first update."""
        if not self.bias_correction or self.decay == 1.0:
            return self.average.clone()
        return self.average / (1.0 - self.decay ** self.steps.clamp(min=1.0))


class MovingAverage:
    """EMA of a network's master shards and BN buffers: rate min(decay, (t + 1) / (t + 10)) as the released code."""

    def __init__(self, network: Network, *, decay: float) -> None:
        self.decay = decay
        self.shards = [shard.detach().clone() for shard in network.master]  # [N] each
        self.buffers = {name: buffer.detach().clone() for name, buffer in stateful_buffers(network.module).items()}

    @torch.no_grad()
    def update(self, network: Network, step: torch.Tensor) -> None:
        """Move towards the network's current values; step int64 [] counts from 0."""
        rate = ((step.double() + 1.0) / (step.double() + 10.0)).clamp(max=self.decay)  # float64 []
        for average, shard in zip(self.shards, network.master, strict=True):
            average.lerp_(shard, (1.0 - rate).to(average.dtype))
        buffers = stateful_buffers(network.module)
        for name, average in self.buffers.items():
            if average.is_floating_point():
                average.lerp_(buffers[name], (1.0 - rate).to(average.dtype))
            else:
                average.copy_(buffers[name])


@dataclass
class State:
    """What a step reads and updates in place. Networks a method does not use are None."""

    method: MethodConfig
    seed: int
    schedules: Schedules
    step: torch.Tensor  # int64 [], counts from 0 within the phase
    teacher: Network | None
    student: Network | None
    student_average: MovingAverage | None
    baseline: Baseline
    world_group: dist.ProcessGroup | None = None
    micro_batches: int = 1  # of every pass of a step, each normalised by itself
    deferred_teacher: bool = False  # its graph is built after the feedback is known, not kept over the student's
    forward_mode: bool = False  # whether exact rules differentiate by a forward-mode pass, not by a difference
    teacher_views: Views = three_views  # what the teacher sees of a batch
    loss_buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # the training loss's, alike on all ranks
    data_ranks: int = 1
    measure_drop: bool = False  # whether the student's labelled loss is measured before its update too, for the log
    noted: PseudoLabels | None = None  # where the step says what it called unlabelled images; None: nowhere

    def new_pass(self, number: int, rows: torch.Tensor, *, learn: bool = True, dropout: bool = True) -> Pass:
        """The context of one forward pass on global rows (int64 [B]) at this step."""
        return Pass(seed=self.seed, stream=number, step=self.step, rows=rows, update_statistics=learn, dropout=dropout)

    def view_logits(self, network: Network, number: int, seen: Seen, *, learn: bool = True) -> Logits:
        """The logits of a network's pass `number` over the views of a micro-batch."""
        logits = network.forward(seen.inputs, self.new_pass(number, seen.rows, learn=learn))  # [N, K]
        return seen.split(logits)

    def mean_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """The average of a tensor that each rank measured on its own rows."""
        if self.world_group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.world_group)
        return total / dist.get_world_size(self.world_group)

    def gather_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor of each rank, all of one shape, in their order: [ranks, ...]."""
        if self.world_group is None:
            return value[None]
        found = value.new_empty(dist.get_world_size(self.world_group) * value.numel())
        dist.all_gather_into_tensor(found, value.flatten(), group=self.world_group)
        return found.view(-1, *value.shape)

    def note_labels(self, logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None) -> None:
        """Tell those who watch what unlabelled images were called; see PseudoLabels.note."""
        if self.noted is not None:
            self.noted.note([part.detach() for part in logits], labels)

    def advance(self) -> None:
        """End the step: student EMA, then the counter."""
        if self.student_average is not None and self.student is not None:
            self.student_average.update(self.student, self.step)
        self.step.add_(1)


def means(parts: Sequence[StepMetrics]) -> dict[str, torch.Tensor]:
    """The averages over micro-batches, by name."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def gradient_dots(u: Sequence[torch.Tensor], v: Sequence[torch.Tensor], network: Network) -> torch.Tensor:
    """[<u, v>, <u, u>, <v, v>] of two gradients held as shards: float64 [3], one all-reduce of three numbers."""
    products = []
    for one, other in zip(u, v, strict=True):
        a, b = one.double(), other.double()  # [shard]
        products.append(torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)]))
    dots = torch.stack(products).sum(0)  # [3]
    if network.dot_group is not None:
        dist.all_reduce(dots, group=network.dot_group)
    return dots
