"""Batch norm over every rank of a group, with its activation; one process alone is a group of one.

torch's SyncBatchNorm refuses CPUs, and its BatchNorm refuses bf16 weights with fp32 statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mpl_scale.models.kernels import IDENTITY, Loops, Mode, activation_of, loops, rows, unrows
from mpl_scale.models.passes import Passes


class _Normalise(torch.autograd.Function):
    """y = act((x - mean) / sqrt(var + eps) * weight + bias) with mean and var over every rank; keeps x alone.

    Forward: one all-reduce of 2 C + 1 numbers, the sums and the element count (a rank may have no element). Backward:
    one of 2 C. The backward of the statistics' all-reduce is a SUM, so that parameters averaged over ranks have the
    gradient of the mean loss. `columns` (start, length) of the width enter the statistics, all are normalised; None:
    all enter.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, group, columns, functions):  # type: ignore[no-untyped-def]
        ours: Loops = functions
        x = x.contiguous(memory_format=_memory_format(x))
        weight, bias = weight.detach(), bias.detach()  # see `compiled`
        if group is None and columns is None and x.numel():
            y, mean, variance, inverse_std, scale, shift, totals = ours.forward(rows(x), weight, bias, eps)
            y = unrows(y, x)
        else:
            own = x if columns is None else x.narrow(-1, *columns)
            totals = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
            if own.numel():
                totals = ours.sums(rows(own))
            if group is not None:
                dist.all_reduce(totals, group=group)
            mean, variance, inverse_std, scale, shift = ours.statistics(totals, weight, bias, eps)
            y = unrows(ours.normalise(rows(x), scale, shift), x) if x.numel() else torch.empty_like(x)
        ctx.save_for_backward(x, mean, inverse_std, scale, shift, totals)
        ctx.ours, ctx.group, ctx.columns, ctx.dtype = ours, group, columns, weight.dtype
        ctx.mark_non_differentiable(mean, variance, totals)
        return y, mean, variance, totals

    @staticmethod
    def backward(ctx: Any, dy, *_):  # type: ignore[no-untyped-def]
        x, mean, inverse_std, scale, shift, totals = ctx.saved_tensors
        ours: Loops = ctx.ours
        dy = dy.contiguous(memory_format=_memory_format(x))
        if ctx.group is None and ctx.columns is None and x.numel():
            dx, gradients, *_through = ours.backward(rows(dy), rows(x), mean, inverse_std, scale, shift, totals)
            return unrows(dx, x), *_halves(gradients, ctx.dtype), None, None, None, None
        gradients = torch.zeros_like(totals[:-1])
        if x.numel():
            gradients = ours.gradient_sums(rows(dy), rows(x), mean, inverse_std, scale, shift)
        own_gradients = _halves(gradients, ctx.dtype)
        if ctx.group is not None:
            dist.all_reduce(gradients, group=ctx.group)

        def gradient_input(sums: torch.Tensor) -> torch.Tensor:
            through = ours.through_statistics(sums, totals, inverse_std)
            return unrows(ours.gradient_input(rows(dy), rows(x), mean, scale, shift, *through), x)

        dx = gradient_input(gradients) if x.numel() else torch.empty_like(x)
        if ctx.columns is not None:  # the others did not enter the statistics: no gradient comes through them
            plain = gradient_input(torch.zeros_like(gradients))
            plain.narrow(-1, *ctx.columns).copy_(dx.narrow(-1, *ctx.columns))
            dx = plain
        return dx, *own_gradients, None, None, None, None


class _Followed(_Normalise):
    """The same with a forward-mode derivative; apart, because what that needs would outlive a recomputed block."""

    @staticmethod
    def forward(ctx: Any, *inputs):  # type: ignore[no-untyped-def]
        outputs = _Normalise.forward(ctx, *inputs)
        ctx.save_for_forward(*ctx.to_save)
        return outputs

    @staticmethod
    def jvp(ctx: Any, dx, dweight, dbias, *_):  # type: ignore[no-untyped-def]
        """dy along dx, dweight and dbias, any of which may be None; an all-reduce of 2 C numbers."""
        x, mean, inverse_std, scale, shift, totals = ctx.saved_tensors
        wide, shape = x.to(mean.dtype), _over_channels(x)
        dx, dweight, dbias = (None if d is None else d.to(mean.dtype) for d in (dx, dweight, dbias))
        spread = {"group": ctx.group, "columns": ctx.columns}
        dz = _derivative(wide, dx, dweight, dbias, mean, inverse_std, scale, totals[-1], **spread)
        dy = ctx.ours.activation.gradient(wide * scale.view(shape) + shift.view(shape), dz).to(x.dtype)
        return dy, None, None, None


class _FollowedAlone(torch.autograd.Function):
    """torch's batch norm of one process, with a forward-mode derivative in fewer loops than its own; learns nothing."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_forward(x, mean, inverse_std, inverse_std * weight)
        return y

    @staticmethod
    def jvp(ctx: Any, dx, dweight, dbias, _):  # type: ignore[no-untyped-def]
        """dy along dx, dweight and dbias, any of which may be None."""
        x, mean, inverse_std, scale = ctx.saved_tensors
        return _derivative(x, dx, dweight, dbias, mean, inverse_std, scale, x.numel() // x.shape[1])


def _derivative(x, dx, dweight, dbias, mean, inverse_std, scale, count, group=None, columns=None):  # type: ignore[no-untyped-def]
    """The derivative of (x - mean) / std * weight + bias over `count` elements a channel, like x [B, C, ...].

    scale (dx - mean of dx - normalised x * mean of dx * normalised x) + normalised x * dweight + dbias, as
    a x + b dx + c with a, b, c [C].
    """
    shape, slope, offset = _over_channels(x), torch.zeros_like(scale), torch.zeros_like(scale)
    if dweight is not None:
        slope = dweight
    if dbias is not None:
        offset = dbias
    if dx is not None:
        own = (slice(None),) * (x.ndim - 1) + (slice(None) if columns is None else _columns(columns),)
        given = (dx[own], x[own], None, None, None, mean, inverse_std, True, 0.0, [False, True, True])
        sums = torch.stack(torch.ops.aten.native_batch_norm_backward(*given)[1:]).double()  # of dx x^, and dx: [2, C]
        if group is not None:
            dist.all_reduce(sums, group=group)
        mean_dx_x, mean_dx = (sums / count).to(scale.dtype)
        slope, offset = slope - scale * mean_dx_x, offset - scale * mean_dx
    slope = slope * inverse_std
    dz = torch.addcmul((offset - mean * slope).view(shape), x, slope.view(shape))
    return dz if dx is None else dz.addcmul_(dx, scale.view(shape))


def _over_channels(x: torch.Tensor) -> tuple[int, ...]:
    """The shape of a vector [C] that multiplies x [B, C, ...]."""
    return (1, -1) + (1,) * (x.ndim - 2)


def _columns(columns: tuple[int, int]) -> slice:
    start, length = columns
    return slice(start, start + length)


def _halves(gradients: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of weight and bias, as copies: the sums may yet be reduced over ranks in place."""
    bias, weight = gradients.to(dtype, copy=True).chunk(2)
    return weight, bias


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    wide = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if wide else torch.contiguous_format


class BatchNorm(nn.Module):
    """Batch norm (and an optional activation, as timm's BatchNormAct2d) over all ranks of `group`.

    Statistics are in fp32 (or the buffers' dtype) whatever the input's; the running variance is unbiased by the
    global count. In a pass with `update_statistics=False` the batch normalises but the moving averages stay.
    Set by mpl_scale.spatial: `statistics_columns` (start, length) leaves halo columns out of the statistics;
    `replicas` is the number of ranks that hold each value (behind a global pool), so that it counts once. `frozen`
    (frozen.py): the running averages normalise in training too, and stay.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self, source: Any, *, passes: Passes, group: dist.ProcessGroup | None, kernels: Mode = "eager"
    ) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.eps, self.momentum = source.eps, source.momentum
        self.drop = getattr(source, "drop", None)
        self.act = getattr(source, "act", None)
        self.passes, self.group, self.kernels = passes, group, kernels
        self.statistics_columns: tuple[int, int] | None = None
        self.replicas = 1
        self.frozen = False
        self.train(source.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, ...] -> the same shape and dtype."""
        if self._by_batch and (self.kernels == "compiled" or self.group is not None):
            drops = self.drop is not None and not isinstance(self.drop, nn.Identity)
            fused = None if drops or self.kernels == "eager" else activation_of(self.act)
            x = self._normalise(x, loops(self.kernels, fused or IDENTITY, x.dtype))
            if fused is not None:
                return x
        else:
            x = self._normalise_alone(x)
        x = x if self.drop is None else self.drop(x)
        return x if self.act is None else self.act(x)

    @property
    def _by_batch(self) -> bool:
        """Whether this batch's statistics normalise it."""
        return self.training and not self.frozen

    def _normalise(self, x: torch.Tensor, functions: Loops) -> torch.Tensor:
        """Normalise by the statistics of this batch over all ranks."""
        function = _Followed if self.passes.follows else _Normalise
        y, mean, variance, totals = function.apply(
            x, self.weight, self.bias, self.eps, self.group, self.statistics_columns, functions
        )
        if self.passes.learns:
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            functions.learn(*running, mean, variance, totals, self.momentum, self.replicas)
        return y

    def _normalise_alone(self, x: torch.Tensor) -> torch.Tensor:
        """torch's own: in evaluation or frozen, and in training one process without compiled loops."""
        wide = self.running_mean.dtype
        if self.passes.follows and self._by_batch and not self.passes.learns:
            return _FollowedAlone.apply(x.to(wide), self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)
        # Copies, because autograd keeps what it is given: a later pass may move the averages, a repeated one not.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.batch_norm(x.to(wide), mean, var, weight, bias, self._by_batch, self.momentum, self.eps)
        if self._by_batch and self.passes.learns:
            self.num_batches_tracked.add_(1)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments that print(module) shows."""
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}, global={self.group is not None}"
