"""Muon (Jordan et al., 2024) over sharded state: matrices move along their momentum made orthogonal; the rest by AdamW.

torch.optim.Muon's rule with adjust_lr_fn = "match_rms_adamw" (Liu et al., 2025), which gives a matrix's step the size
of AdamW's: one rate and one weight decay are for all. A matrix must be whole to be made orthogonal, so the ranks gather
the momentum, take turns at the matrices, and gather the results: two all-reduces of the matrices in bf16, in which
torch computes too.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from mpl_scale.optim.adamw import AdamW
from mpl_scale.optim.optimizers import register_optimizer
from mpl_scale.optim.whole import WholeParameters

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


@register_optimizer("muon")
class Muon(WholeParameters, AdamW):
    """w <- w - lr decay w; m <- mu m + (1 - mu) g; w <- w - lr 0.2 sqrt(max(rows, columns)) O(d).

    d = (1 - mu) g + mu m with Nesterov, else m; O by `orthogonal`. For the matrices of hidden layers (groups.py), a
    convolution's weight as [outputs, the rest]; all others are AdamW's. m is AdamW's `average`.
    """

    matrices_apart = True

    def _move(self, parameters, gradients, states, lr, group):  # type: ignore[no-untyped-def]
        """See ShardOptimizer."""
        if not group["matrices"]:
            super()._move(parameters, gradients, states, lr, group)
            return
        gradients, momentum = self.decay(parameters, gradients, lr, group["weight_decay"]), self.config.momentum
        average = states["average"]
        torch._foreach_lerp_(average, gradients, 1.0 - momentum)
        direction = list(torch._foreach_lerp(gradients, average, momentum)) if self.config.nesterov else average
        step = self._orthogonal(parameters, direction)
        torch._foreach_sub_(parameters, torch._foreach_mul(step, lr.to(parameters[0].dtype)))

    def _orthogonal(self, parameters: list[torch.Tensor], values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors like each shard: the slices of whole matrices, made orthogonal and of AdamW's size."""
        names = [name for parameter in parameters for name in self._names[id(parameter)]]
        shapes = [self.shapes[name] for name in names]
        sizes = [math.prod(shape) for shape in shapes]
        given, found = torch.zeros(2, sum(sizes), dtype=torch.bfloat16, device=values[0].device)
        wholes, results = (dict(zip(names, flat.split(sizes), strict=True)) for flat in (given, found))
        for parameter, tensor in zip(parameters, values, strict=True):
            for piece in self._pieces[id(parameter)]:
                part = tensor.view(-1)[piece.offset : piece.offset + piece.length]
                wholes[piece.name][piece.start : piece.start + piece.length].copy_(part)
        rank, ranks = 0, 1
        if self._group is not None:  # others' elements are 0: the sums are exact
            rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
            dist.all_reduce(given, group=self._group)
        for name, shape in list(zip(names, shapes, strict=True))[rank::ranks]:
            results[name].copy_(orthogonal(wholes[name].view(shape[0], -1)).flatten())
        if self._group is not None:
            dist.all_reduce(found, group=self._group)
        steps = [torch.zeros_like(tensor) for tensor in values]
        for parameter, tensor in zip(parameters, steps, strict=True):
            for piece in self._pieces[id(parameter)]:
                rows = piece.shape[0]
                size = 0.2 * math.sqrt(max(rows, math.prod(piece.shape) // rows))
                part = tensor.view(-1)[piece.offset : piece.offset + piece.length]
                part.copy_(results[piece.name][piece.start : piece.start + piece.length]).mul_(size)
        return steps


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of a matrix U S V^T [rows, columns], roughly: five Newton-Schulz steps in its dtype, torch's in bf16."""
    a, b, c = QUINTIC
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrix.shape[0] > matrix.shape[1] else wide
