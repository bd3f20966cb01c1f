"""Bytes that one real step holds on this rank, in the words of a plan: state, and activations kept for backward passes.

The step runs on networks that are watched: each of their passes is done by the engine as ever, and counted. Numbers do
not change; reading the state of a network takes a walk over its Python objects, so one step of a run is measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mpl_scale.models.passes import Pass
from mpl_scale.mpl import Network, State
from mpl_scale.mpl.methods import Step
from mpl_scale.mpl.network import GradientShard
from mpl_scale.planner.activations import StorageCensus
from mpl_scale.planner.static import reachable_bytes
from mpl_scale.types import Batch, StepMetrics


@dataclass(frozen=True)
class Measured:
    """Bytes.

    static: of both networks' engines, gradients and averages, of a loss's buffers, and of a step's own copies.
    activations: kept, at the worst moment.
    """

    static: int
    activations: int


def measure_step(step: Step, state: State, batch: Batch) -> tuple[StepMetrics, Measured]:
    """Run a step eagerly, and count.

    Args:
        step: of a registered method, or one that can be skipped.
        state: what it trains; not in its first step, in which engines may allocate.
        batch: this rank's rows.

    Returns:
        what the step returns; and what this rank held.
    """
    census = _Census(StorageCensus())
    watched = {
        name: _Watched(network, census)
        for name, network in (("teacher", state.teacher), ("student", state.student))
        if network is not None
    }
    census.networks = [one.network for one in watched.values()]
    metrics = step(dataclasses.replace(state, **watched), batch)  # type: ignore[arg-type]
    static = sum(one.static for one in watched.values()) + reachable_bytes(
        [state.student_average, state.loss_buffers, step]
    )
    return metrics, Measured(static, census.most)


@dataclass
class _Census:
    """What all networks of a step keep together."""

    storages: StorageCensus
    networks: list[Network] = dataclasses.field(default_factory=list)
    known: list[torch.Tensor] = dataclasses.field(default_factory=list)
    most: int = 0

    def count(self) -> None:
        """Update the most bytes kept by a forward pass, networks excluded. At ZeRO-3 the weights are gathered now."""
        modules = [network.module for network in self.networks]
        weights = [p.data for module in modules for p in module.parameters()]
        there = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.most = max(self.most, self.storages.live_bytes(apart_from=(*weights, *there, *self.known)))


class _Watched:
    """A network whose passes are counted; everything else is its own.

    static: at the moment after a backward pass when most gradients are held.
    """

    def __init__(self, network: Network, census: _Census) -> None:
        self.network, self.static = network, 0
        self._census, self._held = census, list[GradientShard]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def forward(self, images: torch.Tensor, pass_: Pass | None = None) -> torch.Tensor:
        """The network's; notes the storages that it makes."""
        with self._census.storages:
            logits = self.network.forward(images, pass_)
        self._census.known += [images, logits]
        self._census.count()
        return logits

    def reduce(self) -> GradientShard:
        """The network's; then its state, and the gradients that the step was given, are counted."""
        gradient = self.network.reduce()
        self._held.append(gradient)
        self.static = max(self.static, reachable_bytes([self.network, self._held]))
        return gradient
