"""LARS (You et al. 2017, reference [82]) over sharded state: the paper's optimiser for finetuning large students (C.4).

A parameter's gradient is scaled by its trust ratio, eta |w| / (|g| + decay |w|), then SGD with momentum takes it. Both
norms are of the whole parameter, so the sums of squares of its slices are added over the ranks that hold them: one
all-reduce of two numbers a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpl_scale.optim.optimizers import SGD, register_optimizer
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


@register_optimizer("lars")
class LARS(SGD):
    """d = trust (g + decay w); v <- momentum v + d; w <- w - lr (d + momentum v) with Nesterov, else w - lr v.

    Batch norm's parameters and biases (tensors of one dimension) have trust 1, and no decay where their group has none.
    Until an engine has called `bind`, a step only allocates state: DeepSpeed takes one with zero gradients while it is
    built.
    """

    elementwise = False
    _shards: dict[int, _Shard] | None = None

    def bind(
        self, masters: Sequence[torch.Tensor], layout: Sequence[Slice], *, group: dist.ProcessGroup | None
    ) -> None:
        """See ShardOptimizer; collective over the group."""
        super().bind(masters, layout, group=group)
        slices = {piece.name: piece.shape for piece in layout}
        if group is not None:
            parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, slices, group=group)
            slices = {name: shape for part in parts for name, shape in part.items()}
        names = sorted(slices)  # the same order on every rank
        number = {name: index for index, name in enumerate(names)}
        device = masters[0].device
        self._group = group
        self._adapted = torch.tensor([len(slices[name]) > 1 for name in names] + [False], device=device)
        self._shards = {}
        for index, master in enumerate(masters):
            sizes: list[int] = []
            owner: list[int] = []
            position = 0
            for piece in sorted((p for p in layout if p.shard == index), key=lambda p: p.offset):
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

    def _gradients(
        self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], lr: torch.Tensor, weight_decay: float
    ) -> list[torch.Tensor]:
        """trust (g + decay w)."""
        assert self._shards is not None
        shards = [self._shards[id(parameter)] for parameter in parameters]
        norms = torch.stack([self._squares(parameters, shards), self._squares(gradients, shards)])
        if self._group is not None:
            dist.all_reduce(norms, group=self._group)
        weight, gradient = norms.sqrt_().unbind()
        ratio = self.config.trust * weight / (gradient + weight_decay * weight)
        trust = torch.where(self._adapted & (weight > 0) & (gradient > 0), ratio, 1.0)
        decayed = super()._gradients(parameters, gradients, lr, weight_decay)
        return [self._scaled(values, shard, trust) for values, shard in zip(decayed, shards, strict=True)]

    def _squares(self, tensors: list[torch.Tensor], shards: list[_Shard]) -> torch.Tensor:
        """Sum of squares of this rank's slices of every parameter, float64 [parameters + 1]."""
        sums = torch.zeros(len(self._adapted), dtype=torch.float64, device=self._adapted.device)
        for tensor, shard in zip(tensors, shards, strict=True):
            norms = torch.stack(torch._foreach_norm(list(tensor.view(-1).split(shard.sizes)))).double()
            sums.index_add_(0, shard.owner, norms.square())
        return sums

    def _scaled(self, values: torch.Tensor, shard: _Shard, trust: torch.Tensor) -> torch.Tensor:
        """Each piece times its parameter's trust ratio."""
        pieces = trust[shard.owner].to(values.dtype)
        factors = torch.repeat_interleave(pieces, shard.lengths, output_size=values.numel())
        return values * factors.view_as(values)
