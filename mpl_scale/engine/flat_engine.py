"""ZeRO-1/2 on persistent flat buffers: the engine that a CUDA graph captures.

Parameters of a group are views into one flat weight buffer, their gradients into one flat gradient buffer. Backward
passes add to the second; a reduce-scatter over the shard group and an all-reduce over the replicas leave this rank's
shard of the averaged gradient; the optimiser updates the fp32 shard; an all-gather refreshes the weights. Nothing is
allocated or read on the host after construction (Megatron's distributed optimizer in miniature). Stage 0 is a shard
group of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.config.schema import OptimConfig
from mpl_scale.mesh import Mesh
from mpl_scale.models.buffers import cast_constants
from mpl_scale.models.kernels import Mode
from mpl_scale.models.passes import Pass, within
from mpl_scale.mpl.network import GradientShard
from mpl_scale.optim import build_optimizer, parameter_groups
from mpl_scale.types import Slice


class FlatNetwork:
    """Implements mpl_scale.mpl.Network; see there for the contract of each method.

    Args:
        module: on the mesh's device, initialised alike on every rank of a shard group and its replicas.
        optim: optimiser and which parameters weight decay covers.
        mesh: shard and replica groups.
        dtype: of weights, gradients and activations; None: as the module is. The master shard is at least fp32.
        gradient_clipping: largest global gradient norm; 0: off.
        accumulates: whether a step has several micro-batches.
        kernels: compiled makes the optimiser's update one loop over each shard.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimConfig,
        mesh: Mesh,
        dtype: torch.dtype | None = None,
        gradient_clipping: float = 0.0,
        accumulates: bool = False,
        kernels: Mode = "eager",
    ) -> None:
        self.module = module
        self._mesh, self._clip = mesh, gradient_clipping
        groups = parameter_groups(module, optim)
        self._dtype = dtype or groups[0]["params"][0].dtype
        cast_constants(module, self._dtype)
        self._layout: list[Slice] = []
        self._buffers = [self._flatten(index, group) for index, group in enumerate(groups)]
        wide = torch.promote_types(self._dtype, torch.float32)
        self._master = [nn.Parameter(b.weight_shard.to(wide)) for b in self._buffers]  # .to aliases when dtypes agree
        self._optimizer = build_optimizer(
            [{**group, "params": [shard]} for shard, group in zip(self._master, groups, strict=True)],
            optim,
        )
        self._optimizer.init_state()
        if kernels == "compiled":
            self._optimizer.compile()
        self._lr = torch.zeros((), device=self._master[0].device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr
        self._optimizer.bind(self._master, self._layout, group=mesh.shard_group)
        self._shards = [[torch.zeros_like(shard.data) for shard in self._master] for _ in range(2)]
        self._clipped = [torch.zeros_like(shard.data) for shard in self._master] if gradient_clipping else []
        narrow = accumulates and self._dtype != wide
        self._accumulated = [torch.zeros_like(shard.data) for shard in self._master] if narrow else []
        self._turn = 0
        self._scale = 1.0 / mesh.world

    def _flatten(self, index: int, group: dict) -> _FlatGroup:
        """Move a group's parameters into one padded buffer and record what this rank's shard of it holds."""
        names, parameters = group["names"], group["params"]
        size, rank = self._mesh.shard_size, self._mesh.shard_index
        total = sum(p.numel() for p in parameters)
        buffers = _FlatGroup(length=-(-total // size), size=size, rank=rank, like=parameters[0], dtype=self._dtype)
        begin, end = rank * buffers.length, (rank + 1) * buffers.length
        position = 0
        for name, parameter in zip(names, parameters, strict=True):
            last = position + parameter.numel()
            weight = buffers.weights[position:last].view_as(parameter)
            weight.copy_(parameter.data)
            parameter.data = weight
            parameter.grad = buffers.gradients[position:last].view_as(parameter)  # autograd accumulates in place
            low, high = max(position, begin), min(last, end)
            if low < high:
                piece = Slice(name, tuple(parameter.shape), low - position, high - low, index, low - begin)
                self._layout.append(piece)
            position = last
        return buffers

    def forward(self, images: torch.Tensor, pass_: Pass | None = None) -> torch.Tensor:
        """Logits in fp32 (or the master's wider dtype)."""
        with within(pass_, self.module):
            return self.module(images.to(self._dtype)).to(self._master[0].dtype)

    def accumulate(self, loss: torch.Tensor) -> None:
        """Add to the flat gradient buffer; where that is narrower than the master, reduce it and add in fp32."""
        loss.backward()
        if self._accumulated:
            for buffers, total in zip(self._buffers, self._accumulated, strict=True):
                if not buffers.trained:
                    continue
                total.add_(buffers.reduce(self._mesh))
                buffers.gradients.zero_()

    def reduce(self) -> GradientShard:
        """Reduce-scatter unless `accumulate` did, average; two static shard buffers take turns."""
        self._turn ^= 1
        shards = self._shards[self._turn]
        for index, (buffers, shard) in enumerate(zip(self._buffers, shards, strict=True)):
            if not buffers.trained:
                continue  # its shard stays 0
            if self._accumulated:
                shard.copy_(self._accumulated[index])
                self._accumulated[index].zero_()
            else:
                shard.copy_(buffers.reduce(self._mesh))
                buffers.gradients.zero_()
            if self._scale != 1.0:
                shard.mul_(self._scale)
        return shards

    @torch.no_grad()
    def apply(self, lr: torch.Tensor) -> None:
        """Clip, update the master shard, gather the weights."""
        shards: Sequence[torch.Tensor] = self._shards[self._turn]
        if self._clip:
            shards = self._clipped_by_global_norm(shards)
        self._lr.copy_(lr)
        for master, shard in zip(self._master, shards, strict=True):
            master.grad = shard
        self._optimizer.step()
        self._gather(frozen=False)

    def _clipped_by_global_norm(self, shards: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """A clipped copy: the caller of `reduce` keeps the unclipped gradient, g_u of equation 12."""
        total = torch.stack([shard.double().square().sum() for shard in shards]).sum()
        if self._mesh.shard_group is not None:
            dist.all_reduce(total, group=self._mesh.shard_group)
        factor = (self._clip / (total.sqrt() + 1e-6)).clamp(max=1.0)
        for shard, clipped in zip(shards, self._clipped, strict=True):
            torch.mul(shard, factor.to(shard.dtype), out=clipped)
        return self._clipped

    def discard(self) -> None:
        """Nothing to do: `reduce` left the flat gradient buffers at zero, and `apply` reads only the last shard."""

    @property
    def refused_update(self) -> bool:
        """Always False: a gradient that is not finite is applied."""
        return False

    @property
    def dot_group(self) -> dist.ProcessGroup | None:
        """Gradients are dotted over the shard group."""
        return self._mesh.shard_group

    @property
    def layout(self) -> Sequence[Slice]:
        """One slice per parameter that overlaps this rank's shard."""
        return self._layout

    @property
    def master(self) -> Sequence[torch.Tensor]:
        """One shard per parameter group."""
        return [shard.data for shard in self._master]

    @property
    def optimizer_state(self) -> dict[str, Sequence[torch.Tensor]]:
        """The optimiser's state by name, one tensor per shard."""
        states = self._optimizer.state
        return {name: [states[shard][name] for shard in self._master] for name in self._optimizer.state_names}

    @property
    def optimizer_counters(self) -> dict[str, torch.Tensor]:
        """The optimiser's counters by name."""
        return self._optimizer.counters

    @property
    def owns_shard(self) -> bool:
        """The first shard group owns, the others are replicas."""
        return self._mesh.rank < self._mesh.shard_size

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copy the master shard into this rank's part of the weights and gather the other ranks' parts."""
        self._gather(frozen=True)

    def _gather(self, *, frozen: bool) -> None:
        for buffers, master in zip(self._buffers, self._master, strict=True):
            if frozen or buffers.trained:
                buffers.gather(master.data, self._mesh)


class _FlatGroup:
    """The weight and gradient buffers of one parameter group, `size` shards of `length` elements.

    trained: whether it has gradients at all.
    """

    def __init__(self, *, length: int, size: int, rank: int, like: torch.Tensor, dtype: torch.dtype) -> None:
        self.length = length
        self.trained = like.requires_grad
        self.weights = torch.zeros(length * size, dtype=dtype, device=like.device)
        self.gradients = torch.zeros_like(self.weights)
        self.weight_shard = self.weights[rank * length : (rank + 1) * length]
        self._sharded = size > 1
        self._received = torch.zeros_like(self.weight_shard) if self._sharded else self.gradients
        self._sent = torch.zeros_like(self.weight_shard) if self._sharded else self.weight_shard

    def reduce(self, mesh: Mesh) -> torch.Tensor:
        """Sum the gradient over all ranks into this rank's shard; the caller reads it, then zeroes `gradients`."""
        if self._sharded:
            dist.reduce_scatter_tensor(self._received, self.gradients, group=mesh.shard_group)
        if mesh.replica_group is not None:
            dist.all_reduce(self._received, group=mesh.replica_group)
        return self._received

    def gather(self, master: torch.Tensor, mesh: Mesh) -> None:
        """Fill the weights from every rank's master shard; the send buffer must not alias the receive buffer."""
        if self._sent.data_ptr() != master.data_ptr():
            self._sent.copy_(master)
        if self._sharded:
            dist.all_gather_into_tensor(self.weights, self._sent, group=mesh.shard_group)
