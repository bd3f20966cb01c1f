"""The layers that must agree over ranks: batch norm over the whole batch (batch_norm.py), dropout and drop-path.

`convert` swaps them into any module tree without changing a state_dict key. torch's dropout depends on how rows lie on
ranks; here a mask is a function of the seed, the step and the global row. timm's fused attention draws its dropout with
torch's numbers inside a kernel: where it drops anything, it takes timm's other path, which calls the module.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.kernels import Mode
from mpl_scale.models.passes import Passes


class Dropout(nn.Dropout):
    """Dropout whose mask is a function of (seed, step, site, global row): the same on every layout of ranks.

    Inputs are [B k, ...], the k parts of a row (windows, patches) one after the other, as timm's attention lays them.
    A layer that runs twice in a pass draws one mask. With `of_rows` False the input is no batch but a table of relative
    positions, with one mask for all rows.
    """

    def __init__(self, p: float, passes: Passes) -> None:
        super().__init__(p)
        self.passes, self.site, self.of_rows = passes, passes.new_site(), True

    @property
    def active(self) -> bool:
        """Whether this pass drops anything."""
        return self.training and self.p > 0.0 and (self.passes.current is None or self.passes.current.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B k, ...] -> x with elements zeroed with probability `p`, the rest divided by 1 - p."""
        if not self.active:
            return x
        if self.of_rows:
            noise = self.passes.uniform(self.site, self.passes.parts(x) * x.shape[1:].numel())
        else:
            noise = self.passes.uniform(self.site, x.numel(), of_rows=False)
        keep = noise.view(x.shape) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))


class DropPath(Dropout):
    """Stochastic depth: the same per part of a row instead of per element."""

    def __init__(self, p: float, passes: Passes, *, scale_by_keep: bool = True) -> None:
        super().__init__(p, passes)
        self.drop_prob, self.scale_by_keep = p, scale_by_keep  # timm's names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B k, ...] -> x with whole parts zeroed with probability `p`, the rest divided by 1 - p."""
        if not self.active:
            return x
        parts = self.passes.parts(x)
        noise = self.passes.per_row(self.site) if parts == 1 else self.passes.uniform(self.site, parts)
        keep = noise.view(-1, *(1,) * (x.ndim - 1)) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p if self.scale_by_keep else 1.0))


class DropoutLinear(nn.Module):
    """A classifier with dropout before it; keys are those of the linear layer alone."""

    def __init__(self, linear: nn.Linear, p: float, passes: Passes) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout = Dropout(p, passes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, features] -> [B, classes]."""
        return F.linear(self.dropout(x), self.weight, self.bias)


def convert(
    module: nn.Module, *, passes: Passes, group: dist.ProcessGroup | None, kernels: Mode = "eager"
) -> nn.Module:
    """Replace batch norm, dropout and drop-path everywhere below `module` (in place); returns the module.

    Raises ValueError for a batch norm this file has no equal of.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine and module.track_running_stats:
        return BatchNorm(module, passes=passes, group=group, kernels=kernels)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"{module} has no counterpart over ranks: only affine BatchNorm1d/2d with running statistics")
    if isinstance(module, nn.Dropout):
        return Dropout(module.p, passes)
    if type(module).__name__ == "DropPath":  # timm's; not imported here, timm costs seconds
        rate, scaled = float(module.drop_prob), bool(module.scale_by_keep)  # type: ignore[arg-type]
        return DropPath(rate, passes, scale_by_keep=scaled)
    if getattr(module, "fused_attn", False) and getattr(getattr(module, "attn_drop", None), "p", 0.0) > 0.0:
        module.fused_attn = False  # type: ignore[assignment]
    for name, child in list(module.named_children()):
        setattr(module, name, convert(child, passes=passes, group=group, kernels=kernels))
        if type(child).__name__ == "RelPosMlp" or name == "meta_mlp":  # timm's MLPs of relative positions
            for layer in child.modules():
                if isinstance(layer, Dropout):
                    layer.of_rows = False
    return module
