"""The base of rules that look at whole parameters while a rank holds slices of them (lars.py, lamb.py, muon.py).

A norm is of the whole parameter: the sums of squares of its slices are added over the ranks that hold them, one
all-reduce of two numbers a parameter for each group of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpl_scale.optim.optimizers import ShardOptimizer
from mpl_scale.types import Slice


@dataclass(frozen=True)
class _Shard:
    """How one shard is cut: sizes of its pieces in order, and whose each is.

    Attributes:
        sizes: elements of each piece; pieces cover the shard.
        lengths: the same on the device, int64 [pieces].
        owner: int64 [pieces], number of the parameter; the last number is nobody's (padding).
    """

    sizes: list[int]
    lengths: torch.Tensor
    owner: torch.Tensor


class WholeParameters(ShardOptimizer):
    """Base: norms of whole parameters, and shards scaled parameter by parameter; which slices are whose.

    Until an engine has called `bind`, a step only allocates state: DeepSpeed takes one with zero gradients while it is
    built.
    """

    elementwise = False
    _shards: dict[int, _Shard] | None = None
    _names: dict[int, list[str]]
    """Of each shard, the parameters that lie in it on any rank; `shapes` are theirs."""
    _pieces: dict[int, list[Slice]]

    def bind(
        self, masters: Sequence[torch.Tensor], layout: Sequence[Slice], *, group: dist.ProcessGroup | None
    ) -> None:
        """See ShardOptimizer; collective over the group."""
        super().bind(masters, layout, group=group)
        found = {piece.name: (piece.shape, piece.shard) for piece in layout}
        if group is not None:
            parts: list[dict[str, tuple[tuple[int, ...], int]]] = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, found, group=group)
            found = {name: place for part in parts for name, place in part.items()}
        names = sorted(found)  # the same order on every rank
        number = {name: index for index, name in enumerate(names)}
        device = masters[0].device
        self._group = group
        self.shapes = {name: found[name][0] for name in names}
        self.is_matrix = torch.tensor([len(self.shapes[name]) > 1 for name in names] + [False], device=device)
        self._shards, self._names, self._pieces = {}, {}, {}
        for index, master in enumerate(masters):
            self._names[id(master)] = [name for name in names if found[name][1] == index]
            self._pieces[id(master)] = [piece for piece in layout if piece.shard == index]
            sizes: list[int] = []
            owner: list[int] = []
            position = 0
            for piece in sorted(self._pieces[id(master)], key=lambda p: p.offset):
                if piece.offset > position:
                    sizes.append(piece.offset - position)
                    owner.append(len(names))
                sizes.append(piece.length)
                owner.append(number[piece.name])
                position = piece.offset + piece.length
            if master.numel() > position:
                sizes.append(master.numel() - position)
                owner.append(len(names))
            lengths = torch.tensor(sizes, dtype=torch.int64, device=device)
            self._shards[id(master)] = _Shard(sizes, lengths, torch.tensor(owner, dtype=torch.int64, device=device))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if self._shards is None:
            self.init_state()
        else:
            super().step(closure)

    def _norms(
        self, parameters: list[torch.Tensor], first: list[torch.Tensor], second: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms of whole parameters of two tensors like each shard: float64 [parameters + 1] each."""
        shards = self._shards_of(parameters)
        norms = torch.stack([self._squares(first, shards), self._squares(second, shards)])
        if self._group is not None:
            dist.all_reduce(norms, group=self._group)
        return norms.sqrt_().unbind()  # type: ignore[return-value]

    def _scaled(
        self, parameters: list[torch.Tensor], values: list[torch.Tensor], factors: torch.Tensor
    ) -> list[torch.Tensor]:
        """Tensors like each shard, every element times its parameter's factor (of `factors` [parameters + 1])."""
        scaled = []
        for tensor, shard in zip(values, self._shards_of(parameters), strict=True):
            pieces = factors[shard.owner].to(tensor.dtype)
            spread = torch.repeat_interleave(pieces, shard.lengths, output_size=tensor.numel())
            scaled.append(tensor * spread.view_as(tensor))
        return scaled

    def _shards_of(self, parameters: list[torch.Tensor]) -> list[_Shard]:
        assert self._shards is not None
        return [self._shards[id(parameter)] for parameter in parameters]

    def _squares(self, tensors: list[torch.Tensor], shards: list[_Shard]) -> torch.Tensor:
        """Sum of squares of this rank's slices of every parameter, float64 [parameters + 1]."""
        sums = torch.zeros(len(self.is_matrix), dtype=torch.float64, device=self.is_matrix.device)
        for tensor, shard in zip(tensors, shards, strict=True):
            norms = torch.stack(torch._foreach_norm(list(tensor.view(-1).split(shard.sizes)))).double()
            sums.index_add_(0, shard.owner, norms.square())
        return sums
