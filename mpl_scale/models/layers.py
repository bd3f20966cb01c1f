"""The layers that must agree over ranks: batch norm over the whole batch, dropout and drop-path by counter.

`convert` swaps them into any module tree without changing a state_dict key. torch's SyncBatchNorm refuses CPU, and
its BatchNorm refuses bf16 weights with fp32 statistics; torch's dropout depends on how rows lie on ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.models.passes import Passes


class _GlobalBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with mean and var over every rank of a group.

    Forward: one all-reduce of 2 C + 1 numbers (sums about `center`, which keeps them accurate in fp32, and the
    element count; a rank may have none). Backward: one of 2 C. The backward of the statistics' all-reduce is a SUM,
    so that parameters averaged over ranks have the gradient of the mean loss. `columns` (start, length) of the width
    enter the statistics, all are normalised; None: all enter.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, center, eps, group, columns):  # type: ignore[no-untyped-def]
        dims = (0, *range(2, x.ndim))
        wide = x.to(center.dtype)
        own = wide if columns is None else wide.narrow(-1, *columns)
        local_count = own.numel() // x.shape[1]
        if local_count:
            variance, mean = torch.var_mean(own, dims, correction=0)
            offset = mean - center
            sums = torch.cat([offset, variance + offset * offset, torch.ones_like(offset[:1])]) * local_count
        else:  # the mean of nothing is NaN, its sum is not
            sums = center.new_zeros(2 * x.shape[1] + 1)
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        offset, square = (sums[:-1] / count).chunk(2)
        mean, variance = center + offset, square - offset * offset
        inverse_std = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.group, ctx.dims, ctx.columns = group, dims, columns
        scale = inverse_std * weight.to(center.dtype)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        y = torch.addcmul((bias.to(center.dtype) - mean * scale).view(shape), wide, scale.view(shape)).to(x.dtype)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy, *_):  # type: ignore[no-untyped-def]
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        shape = (1, -1) + (1,) * (x.ndim - 2)
        dy_wide = dy.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        grad_bias, grad_weight = dy_wide.sum(ctx.dims), (dy_wide * normalised).sum(ctx.dims)
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_normalised = (sums / count).chunk(2)
        through_statistics = mean_dy.view(shape) + normalised * mean_dy_normalised.view(shape)
        if ctx.columns is None:
            centred = dy_wide - through_statistics
        else:
            centred = dy_wide.clone()
            centred.narrow(-1, *ctx.columns).sub_(through_statistics.narrow(-1, *ctx.columns))
        dx = (centred * (inverse_std * weight.to(mean.dtype)).view(shape)).to(x.dtype)
        return dx, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None


class BatchNorm(nn.Module):
    """Batch norm (and an optional activation, as timm's BatchNormAct2d) over all ranks of `group`.

    Statistics are in fp32 (or the buffers' dtype) whatever the input's; the running variance is unbiased by the
    global count. In a pass with `update_statistics=False` the batch normalises but the moving averages stay.
    Set by mpl_scale.spatial: `statistics_columns` (start, length) leaves halo columns out of the statistics;
    `replicas` is the number of ranks that hold each value (behind a global pool), so that it counts once.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, source: Any, *, passes: Passes, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.eps, self.momentum = source.eps, source.momentum
        self.drop = getattr(source, "drop", None)
        self.act = getattr(source, "act", None)
        self.passes, self.group = passes, group
        self.statistics_columns: tuple[int, int] | None = None
        self.replicas = 1
        self.train(source.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, ...] -> the same shape and dtype."""
        x = self._normalise(x)
        x = x if self.drop is None else self.drop(x)
        return x if self.act is None else self.act(x)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.running_mean.dtype
        learn = self.training and self.passes.learns
        if learn:
            self.num_batches_tracked.add_(1)
        if not self.training or self.group is None:
            # Copies, because autograd keeps what it is given: a later pass may move the averages, a repeated one not.
            mean, var = self.running_mean.clone(), self.running_var.clone()
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            y = F.batch_norm(x.to(wide), mean, var, weight, bias, self.training, self.momentum, self.eps)
            if learn:
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
            return y.to(x.dtype)
        center = self.passes.remember(self, self.running_mean)
        y, mean, variance, count = _GlobalBatchNorm.apply(
            x, self.weight, self.bias, center, self.eps, self.group, self.statistics_columns
        )
        if learn:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - self.replicas)), self.momentum)
        return y

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}, global={self.group is not None}"


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
        """Shown by print(module)."""
        return f"rate={self.rate}"


class DropPath(Dropout):
    """Stochastic depth: the same per sample instead of per element."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...] -> x with whole samples zeroed with probability `rate`, the rest divided by 1 - rate."""
        if not self.active:
            return x
        keep = self.passes.uniform(self.site, 1).view(-1, *(1,) * (x.ndim - 1)) >= self.rate
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


def convert(module: nn.Module, *, passes: Passes, group: dist.ProcessGroup | None) -> nn.Module:
    """Replace batch norm, dropout and drop-path everywhere below `module` (in place); returns the module.

    Raises ValueError for a batch norm this file has no equal of.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine and module.track_running_stats:
        return BatchNorm(module, passes=passes, group=group)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"{module} has no counterpart over ranks: only affine BatchNorm1d/2d with running statistics")
    if isinstance(module, nn.Dropout):
        return Dropout(module.p, passes)
    if type(module).__name__ == "DropPath":  # timm's; not imported here, timm costs seconds
        return DropPath(float(module.drop_prob), passes)  # type: ignore[arg-type]
    for name, child in list(module.named_children()):
        setattr(module, name, convert(child, passes=passes, group=group))
    return module
