"""The layers that must agree over ranks: batch norm over the whole batch (batch_norm.py), dropout and drop-path.

`convert` swaps them into any module tree without changing a state_dict key. torch's dropout depends on how rows lie on
ranks; here a mask is a function of the seed, the step and the global row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.kernels import Mode
from mpl_scale.models.passes import Passes


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, site, global row): the same on every layout of ranks."""

    def __init__(self, rate: float, passes: Passes) -> None:
        super().__init__()
        self.rate, self.passes, self.site = rate, passes, passes.new_site()

    @property
    def active(self) -> bool:
        """Whether this pass drops anything."""
        return self.training and self.rate > 0.0 and (self.passes.current is None or self.passes.current.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...] -> x with elements zeroed with probability `rate`, the rest divided by 1 - rate."""
        if not self.active:
            return x
        keep = self.passes.uniform(self.site, x.shape[1:].numel()).view(x.shape) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate))

    def extra_repr(self) -> str:
        """The arguments that print(module) shows."""
        return f"rate={self.rate}"


class DropPath(Dropout):
    """Stochastic depth: the same per sample instead of per element."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...] -> x with whole samples zeroed with probability `rate`, the rest divided by 1 - rate."""
        if not self.active:
            return x
        keep = self.passes.per_row(self.site).view(-1, *(1,) * (x.ndim - 1)) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate))


class DropoutLinear(nn.Module):
    """A classifier with dropout before it; keys are those of the linear layer alone."""

    def __init__(self, linear: nn.Linear, rate: float, passes: Passes) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout = Dropout(rate, passes)

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
        return DropPath(float(module.drop_prob), passes)  # type: ignore[arg-type]
    for name, child in list(module.named_children()):
        setattr(module, name, convert(child, passes=passes, group=group, kernels=kernels))
    return module
