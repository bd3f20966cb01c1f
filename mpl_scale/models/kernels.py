"""The loops of batch norm with its activation: plain torch, or the same functions compiled by inductor.

Forward is a pass for the sums and one that normalises and activates; backward recomputes the activation from the input,
so the input is all that is kept. Compiled, each is one loop over memory (C++ on a CPU, Triton on a GPU). Tensors are
[B, C, L] views of any strides; vectors over the channels are fp32 (or wider) [C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.compiling import compiled

Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function of batch norm's output and its derivative. slope: of leaky_relu."""

    name: Literal["identity", "relu", "leaky_relu", "silu"] = "identity"
    slope: float = 0.0

    def of(self, z: torch.Tensor) -> torch.Tensor:
        """The activation of z, elementwise."""
        if self.name == "silu":
            return F.silu(z)
        return z if self.name == "identity" else torch.where(z > 0, z, z * self.slope)

    def gradient(self, z: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """dy times the derivative at z."""
        if self.name == "silu":
            sigmoid = torch.sigmoid(z)
            return dy * (sigmoid * (1 + z * (1 - sigmoid)))
        return dy if self.name == "identity" else torch.where(z > 0, dy, dy * self.slope)


IDENTITY = Activation()


def activation_of(module: nn.Module | None) -> Activation | None:
    """The activation that a module computes, if the loops know it."""
    if module is None or isinstance(module, nn.Identity):
        return IDENTITY
    if isinstance(module, nn.ReLU):
        return Activation("relu")
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", float(module.negative_slope))
    return Activation("silu") if isinstance(module, nn.SiLU) else None


@dataclass(frozen=True)
class Loops:
    """The functions for one activation; see `loops`."""

    activation: Activation
    sums: Callable[..., torch.Tensor]
    statistics: Callable[..., tuple[torch.Tensor, ...]]
    normalise: Callable[..., torch.Tensor]
    learn: Callable[..., None]
    gradient_sums: Callable[..., torch.Tensor]
    through_statistics: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gradient_input: Callable[..., torch.Tensor]
    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


@cache
def loops(mode: Mode, activation: Activation = IDENTITY, dtype: torch.dtype = torch.float32) -> Loops:
    """The loops of a mode for inputs of a dtype; compiled ones are built when they first meet a kind of shape."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def total(x: torch.Tensor) -> torch.Tensor:
        """[B, C, L] -> float64 [C]: short sums as they are, their sum in float64."""
        return x.sum(2).double().sum(0)

    def over(vector: torch.Tensor) -> torch.Tensor:
        return vector[None, :, None]

    def sums(x: torch.Tensor) -> torch.Tensor:
        """Sums of x and of its square, and the element count: float64 [2 C + 1].

        Taken about the first element of each channel, and moved to 0 in float64: no cancellation far from 0.
        """
        count = x.shape[0] * x.shape[2]
        center = wide(x[0, :, 0])
        offset = wide(x) - over(center)
        first, second, exact = total(offset), total(offset * offset), center.double()
        return torch.cat(
            [first + count * exact, second + exact * (2 * first + count * exact), torch.full_like(exact[:1], count)]
        )

    def statistics(totals: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):  # type: ignore[no-untyped-def]
        """mean, variance, 1 / sqrt(variance + eps), scale and shift, [C] each, from the sums over all ranks."""
        exact_mean, square = (totals[:-1] / totals[-1]).chunk(2)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mean, variance = exact_mean.to(dtype), (square - exact_mean * exact_mean).clamp(min=0.0).to(dtype)
        inverse_std = torch.rsqrt(variance + eps)
        scale = inverse_std * weight
        return mean, variance, inverse_std, scale, bias - mean * scale

    def normalise(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """act(x * scale + shift) in x's dtype."""
        return activation.of(wide(x) * over(scale) + over(shift)).to(x.dtype)

    def learn(running_mean, running_var, tracked, mean, variance, totals, momentum, replicas):  # type: ignore[no-untyped-def]
        """Move the running statistics, in place; the variance unbiased by the count of distinct values."""
        unbiased = variance * (totals[-1] / (totals[-1] - replicas)).to(variance.dtype)
        running_mean.copy_(torch.lerp(running_mean, mean.to(running_mean.dtype), momentum))
        running_var.copy_(torch.lerp(running_var, unbiased.to(running_var.dtype), momentum))
        tracked.add_(1)

    def gradient_sums(dy, x, mean, inverse_std, scale, shift):  # type: ignore[no-untyped-def]
        """Sums of dz and of dz times the normalised x, z = x * scale + shift: float64 [2 C]."""
        x = wide(x)
        dz = activation.gradient(x * over(scale) + over(shift), wide(dy))
        return torch.cat([total(dz), total(dz * ((x - over(mean)) * over(inverse_std)))])

    def through_statistics(gradients, totals, inverse_std):  # type: ignore[no-untyped-def]
        """The mean of dz, and 1 / std times that of dz times the normalised x: [C] each, from the sums over all ranks.

        Apart from `gradient_input`, whose loop would divide in float64 at every element.
        """
        mean_dz, mean_dz_x = (gradients / totals[-1]).to(inverse_std.dtype).chunk(2)
        return mean_dz.clone(), mean_dz_x * inverse_std

    def gradient_input(dy, x, mean, scale, shift, mean_dz, slope):  # type: ignore[no-untyped-def]
        """scale * (dz - mean of dz - normalised x * mean of dz x) in x's dtype."""
        dtype, x = x.dtype, wide(x)
        dz = activation.gradient(x * over(scale) + over(shift), wide(dy))
        return ((dz - over(mean_dz) - (x - over(mean)) * over(slope)) * over(scale)).to(dtype)

    # One call in place of three where no all-reduce comes between: calling a compiled function costs time itself.

    def forward(x, weight, bias, eps):  # type: ignore[no-untyped-def]
        """sums, statistics and normalise: y, what `statistics` returns, and the sums."""
        totals = sums(x)
        mean, variance, inverse_std, scale, shift = statistics(totals, weight, bias, eps)
        return normalise(x, scale, shift), mean, variance, inverse_std, scale, shift, totals

    def backward(dy, x, mean, inverse_std, scale, shift, totals):  # type: ignore[no-untyped-def]
        """The three functions of the backward pass: dx and the sums; what else is returned is so not inlined."""
        gradients = gradient_sums(dy, x, mean, inverse_std, scale, shift)
        through = through_statistics(gradients, totals, inverse_std)
        return gradient_input(dy, x, mean, scale, shift, *through), gradients, *through

    functions: list[Callable[..., Any]] = [sums, statistics, normalise, learn, gradient_sums, through_statistics]
    functions += [gradient_input, forward, backward]
    if mode == "eager":
        return Loops(activation, *functions)
    # Otherwise dz, which two sums read, would be written out in between.
    options = {"realize_reads_threshold": 64, "realize_opcount_threshold": 256}
    return Loops(activation, *(compiled(function, options) for function in functions))


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [B, C] or [B, C, H, W] as [B', C, L] without a copy, where its memory is contiguous or channels-last.

    Detached, as `compiled` asks.
    """
    if x.ndim == 2:
        return x[:, :, None].detach()
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(0, 1).permute(0, 2, 1).detach()
    return x.flatten(2).detach()


def unrows(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: a fresh y [B', C, L] to like's shape and strides.

    Not a view, in autograd's eyes: a custom function may not return one that is modified in place later.
    """
    assert y.stride() == rows(like).stride() or min(y.shape) < 2, "the loops keep the layout"
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), like.shape, like.stride())
