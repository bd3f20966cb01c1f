"""Steps that change nothing where their numbers are none (`guard.nonfinite: skip`).

The step runs as it is. What it changed is taken back by a selection on the device, so nothing is read on the host and a
CUDA graph captures it; weights, optimisers, averages, baseline and batch statistics are bit by bit what they were. It
costs a copy of that state, and another gathering of the weights at each step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.mpl.methods import Step
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import State
from mpl_scale.types import Batch, StepMetrics

REMEMBERED = 64
"""Skipped steps whose numbers are kept until they are reported."""
SKIPPED, IN_A_ROW = "skipped_steps", "skipped_in_a_row"


class SkipNonfinite:
    """Calls a step of a state; takes back one with a metric, or a result, that is NaN or infinite on any rank.

    The step counter goes on, so that the next step has other images.
    """

    def __init__(self, step: Step, state: State) -> None:
        self._step, self._kept = step, [tensor.clone() for tensor in _changed(state)]
        device = state.step.device
        self._skipped, self._in_a_row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._told = 0
        self._numbers = torch.full((REMEMBERED,), -1, dtype=torch.int64, device=device)

    def __call__(self, state: State, batch: Batch) -> StepMetrics:
        """The step's metrics, of a skipped one too, with how many were skipped: in all, and in a row."""
        changed = list(_changed(state))
        with torch.no_grad():
            for kept, tensor in zip(self._kept, changed, strict=True):
                kept.copy_(tensor)
        number = state.step.clone()
        metrics = self._step(state, batch)
        with torch.no_grad():
            bad = self._is_bad(metrics, changed, state)
            for kept, tensor in zip(self._kept, changed, strict=True):
                tensor.copy_(torch.where(bad.to(tensor.device), kept, tensor))  # an offloaded one is elsewhere
            for network in _networks(state):
                network.refresh_weights()
            place = (self._skipped % REMEMBERED)[None]
            self._numbers.index_copy_(0, place, torch.where(bad, number, self._numbers.index_select(0, place)[0])[None])
            self._skipped.add_(bad)
            self._in_a_row.add_(1).mul_(bad)
        return {**metrics, SKIPPED: self._skipped, IN_A_ROW: self._in_a_row}

    def _is_bad(self, metrics: StepMetrics, changed: list[torch.Tensor], state: State) -> torch.Tensor:
        """Whether any rank has a non-finite number: bool []."""
        numbers = [*metrics.values(), *(tensor for tensor in changed if tensor.is_floating_point())]
        bad = torch.stack([number.isfinite().all() for number in numbers]).all().logical_not()
        if any(network.refused_update for network in _networks(state)):  # the other network may have moved
            bad = torch.ones_like(bad)
        if state.world_group is None:
            return bad
        found = bad.to(torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=state.world_group)
        return found > 0

    def news(self) -> list[int]:
        """The skipped steps since it was asked last, by number from 0 in the phase; the last 64. Read on the host."""
        total = int(self._skipped)
        if total == self._told:
            return []
        numbers, first = self._numbers.tolist(), max(self._told, total - REMEMBERED)
        self._told = total
        return [numbers[index % REMEMBERED] for index in range(first, total)]


def _networks(state: State) -> Iterator[Network]:
    for network in (state.teacher, state.student):
        if network is not None:
            yield network


def _changed(state: State) -> Iterator[torch.Tensor]:
    """Everything that a step changes but its counter, live."""
    for network in _networks(state):
        yield from network.master
        for shards in network.optimizer_state.values():
            yield from shards
        yield from network.optimizer_counters.values()
        yield from stateful_buffers(network.module).values()
    if state.student_average is not None:
        yield from state.student_average.shards
        yield from state.student_average.buffers.values()
    yield from (state.baseline.average, state.baseline.steps, *state.loss_buffers.values())
