"""What is saved: named pieces of global tensors, and how a sharded network's state is cut into them.

Keys of a network: {prefix}/master/{parameter}, {prefix}/{state}/{parameter}, {prefix}/buffer/{buffer},
{prefix}/counter/{counter}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mpl_scale.checkpoint.format import Kind
from mpl_scale.mesh import Mesh
from mpl_scale.models.buffers import stateful_buffers
from mpl_scale.mpl.network import Network
from mpl_scale.types import Slice


@dataclass(frozen=True)
class Entry:
    """Elements [start, start + tensor.numel()) of the flattened global tensor `key` of the given shape.

    `tensor` is live and contiguous, of any shape (views into a shard are): saving reads it, loading fills it in place.
    `write`: whether this rank saves it; over all ranks every element must be written exactly once.
    """

    key: str
    tensor: torch.Tensor
    start: int
    shape: tuple[int, ...]
    write: bool

    def __post_init__(self) -> None:
        if not self.tensor.is_contiguous():
            raise ValueError(f"checkpoint entry {self.key}: its tensor is not contiguous; give a contiguous one")

    @property
    def kind(self) -> Kind:
        """Shape of the whole and dtype."""
        return Kind(tuple(self.shape), str(self.tensor.dtype).removeprefix("torch."))

    @property
    def end(self) -> int:
        """One past the last element, in the flattened whole."""
        return self.start + self.tensor.numel()

    @property
    def flat(self) -> torch.Tensor:
        """The live tensor as [end - start], without autograd."""
        return self.tensor.detach().view(-1)


def shard_entries(prefix: str, layout: Sequence[Slice], *, tensors: Sequence[torch.Tensor], write: bool) -> list[Entry]:
    """Entries {prefix}/{parameter} for 1-D shard tensors laid out by `layout` (master weights, their EMA, ...)."""
    return [
        Entry(
            key=f"{prefix}/{piece.name}",
            tensor=tensors[piece.shard][piece.offset : piece.offset + piece.length],
            start=piece.start,
            shape=tuple(piece.shape),
            write=write,
        )
        for piece in layout
    ]


def replicated_entries(prefix: str, tensors: Mapping[str, torch.Tensor], *, mesh: Mesh) -> list[Entry]:
    """Entries {prefix}/{name} for tensors every rank holds in full: rank 0 writes, every rank loads."""
    return [
        Entry(key=f"{prefix}/{name}", tensor=tensor, start=0, shape=tuple(tensor.shape), write=mesh.is_main)
        for name, tensor in tensors.items()
    ]


def network_entries(prefix: str, network: Network, *, mesh: Mesh) -> list[Entry]:
    """Master weights, optimiser state and buffers of a network. After a load, call network.refresh_weights()."""
    state = {"master": network.master, **network.optimizer_state}
    entries = [
        entry
        for name, tensors in state.items()
        for entry in shard_entries(f"{prefix}/{name}", network.layout, tensors=tensors, write=network.owns_shard)
    ]
    entries += replicated_entries(f"{prefix}/counter", network.optimizer_counters, mesh=mesh)
    return entries + replicated_entries(f"{prefix}/buffer", stateful_buffers(network.module), mesh=mesh)
