"""What the step asks of a sharded network: the one interface between the method and the ZeRO engines.

The method (mpl/) never sees ranks, stages or buffers. An engine (engine/) owns a module, its fp32 master shard, its
optimiser shard and its gradient buffers, and implements this protocol. Terms: a *gradient shard* is this rank's
disjoint share of the gradient averaged over all ranks, as fp32 1-D tensors laid out as `master` (zero in padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.models.passes import Pass
from mpl_scale.types import Slice

GradientShard = Sequence[torch.Tensor]


class Network(Protocol):
    """A module under ZeRO. Calls: (forward+, accumulate) for each micro-batch, reduce, then one of apply or discard."""

    module: nn.Module

    def forward(self, images: torch.Tensor, pass_: Pass | None = None) -> torch.Tensor:
        """Logits float32 [B, classes] for images [B, ...]. Builds the autograd graph when gradients are enabled.

        pass_: whose random numbers layers draw, and whether batch norm learns; None: of a module without such layers.
        """

    def accumulate(self, loss: torch.Tensor) -> None:
        """Backpropagate a 0-d loss: this rank's mean over one micro-batch, divided by their number."""

    def reduce(self) -> GradientShard:
        """The shard of the accumulated gradient, averaged over all ranks.

        The result stays valid, through apply and discard, until the second next reduce: engines may alternate two
        static buffers, as a CUDA graph needs.
        """

    def apply(self, lr: torch.Tensor) -> None:
        """Clip (if configured), update the fp32 master shard with the gradient last reduced, gather the weights.

        lr is a 0-d float32 device tensor. Leaves no gradient behind.
        """

    def discard(self) -> None:
        """Drop the gradient last reduced: weights, optimiser state and the next gradient are untouched by it."""

    @property
    def refused_update(self) -> bool:
        """Whether the last `apply` changed nothing because the gradient was not finite; False where unchecked."""

    @property
    def dot_group(self) -> dist.ProcessGroup | None:
        """The group over which gradient shards are disjoint; None where every rank holds the whole gradient."""

    # State, for EMA, checkpoints, evaluation and export. All 1-D fp32 (int64 for counters), live views where noted.

    @property
    def layout(self) -> Sequence[Slice]:
        """Which parameter elements the shard tensors hold; padding is in no slice."""

    @property
    def master(self) -> Sequence[torch.Tensor]:
        """The fp32 master weights of this rank's shard: live 1-D tensors, one per shard number."""

    @property
    def optimizer_state(self) -> dict[str, Sequence[torch.Tensor]]:
        """Optimiser state by name (momentum, square_average, ...): live 1-D tensors laid out as `master`."""

    @property
    def optimizer_counters(self) -> dict[str, torch.Tensor]:
        """Optimiser counters by name: live, 0-d, the same on every rank."""

    @property
    def owns_shard(self) -> bool:
        """True on the ranks whose shards together cover every parameter exactly once (replicas: False)."""

    def refresh_weights(self) -> None:
        """Make the module's weights (all ranks) equal to the master shards, after these were loaded or overwritten."""
