"""A module sharded by hand, and checkpoints of it: written and compared on every rank of a pool."""

from __future__ import annotations

import torch
from torch import nn

from mpl_scale.checkpoint import (
    Entry,
    load,
    network_entries,
    newest_good,
    save,
)
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.types import Slice

CPU = torch.device("cpu")


class HandSharded:
    """A module under ZeRO by hand: two flat shards (weights, the rest), each cut evenly over the shard group."""

    def __init__(self, mesh: Mesh, *, features: int = 5, classes: int = 3) -> None:
        self.module = nn.Sequential(nn.Linear(7, features), nn.BatchNorm1d(features), nn.Linear(features, classes))
        self.layout: list[Slice] = []
        self.master: list[torch.Tensor] = []
        self.owns_shard = mesh.rank < mesh.shard_size
        parameters = dict(self.module.named_parameters())
        for matrices in (True, False):
            group = {name: p for name, p in parameters.items() if (p.dim() > 1) == matrices}
            self._cut(group, mesh)
        self.optimizer_state = {"momentum": [torch.zeros_like(shard) for shard in self.master]}
        self.optimizer_counters: dict[str, torch.Tensor] = {}

    def _cut(self, group: dict[str, nn.Parameter], mesh: Mesh) -> None:
        total = sum(p.numel() for p in group.values())
        size = -(-total // mesh.shard_size)  # the last rank's shard is padded
        begin, position = size * mesh.shard_index, 0
        for name, p in group.items():
            low, high = max(begin, position), min(begin + size, position + p.numel())
            if low < high:
                self.layout.append(
                    Slice(name, tuple(p.shape), low - position, high - low, len(self.master), low - begin)
                )
            position += p.numel()
        self.master.append(torch.full((size,), float("nan")))

    def fill(self, seed: int) -> None:
        """Values that depend on the parameter's element and on nothing of the layout."""
        for kind, tensors in (("master", self.master), *self.optimizer_state.items()):
            for piece in self.layout:
                whole = expected(f"{kind}/{piece.name}", piece.shape, seed).view(-1)
                values = whole[piece.start : piece.start + piece.length]
                tensors[piece.shard][piece.offset : piece.offset + piece.length] = values
        for name, buffer in self.module.named_buffers():
            buffer.copy_(expected(f"buffer/{name}", buffer.shape, seed))


def expected(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The whole tensor a key stands for."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(key.encode()))
    return torch.randn(shape, generator=generator) * 100


def build(world_size: int | None = None, **kwargs: int) -> tuple[Mesh, HandSharded, list[Entry]]:
    mesh = build_mesh(device=CPU, shard_size=world_size)
    network = HandSharded(mesh, **kwargs)
    return mesh, network, network_entries("student", network, mesh=mesh)


def save_step(root: str, step: int, *, shard_size: int | None = None, keep: int = 3) -> str:
    mesh, network, entries = build(shard_size)
    network.fill(step)
    metadata = {"step": step, "baseline": 0.1 + 0.2}
    return str(save(root, step=step, entries=entries, metadata=metadata, mesh=mesh, keep=keep))


def check_load(path: str, step: int, *, shard_size: int | None = None) -> None:
    """Load on this layout and compare bitwise with what this layout would hold had it trained itself."""
    mesh, network, entries = build(shard_size)
    _, reference, wanted = build(shard_size)
    reference.fill(step)
    index = load(path, entries, mesh=mesh)
    assert index.metadata == {"step": step, "baseline": 0.1 + 0.2}
    for entry, reference_entry in zip(entries, wanted, strict=True):
        assert torch.equal(entry.tensor, reference_entry.tensor), entry.key
    padding = [shard.isnan().sum().item() for shard in network.master]
    assert padding == [shard.isnan().sum().item() for shard in reference.master]


def load_newest_here(root: str) -> tuple[str | None, int | None, list[str]]:
    mesh, _, entries = build()
    warnings: list[str] = []
    found = newest_good(root, mesh=mesh, warn=warnings.append)
    if found is None:
        return None, None, warnings
    folder, index = found
    load(folder, entries, mesh=mesh, index=index)
    _, reference, wanted = build()
    reference.fill(index.step)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(entries, wanted, strict=True))
    return folder.name, index.step, warnings
