"""The four loops of batch norm with its activation: plain torch, or the same functions compiled by inductor.

Forward is a pass for the sums and one that normalises and activates; backward recomputes the activation from the input,
so the input is all that is kept. Compiled, each is one loop over memory (C++ on a CPU, Triton on a GPU). Tensors are
[B, C, L] views of any strides; vectors over the channels are fp32 (or wider) [C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function of batch norm's output and its derivative. slope: of leaky_relu."""

    name: Literal["identity", "relu", "leaky_relu", "silu"] = "identity"
    slope: float = 0.0

    def of(self, z: torch.Tensor) -> torch.Tensor:
        """The function."""
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
    """The four functions for one activation; shapes as below."""

    sums: Callable[..., torch.Tensor]
    normalise: Callable[..., torch.Tensor]
    gradient_sums: Callable[..., torch.Tensor]
    gradient_input: Callable[..., torch.Tensor]


@cache
def loops(mode: Mode, activation: Activation = IDENTITY) -> Loops:
    """The loops of a mode; compiled ones are built when they first meet a kind of shape."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def total(x: torch.Tensor) -> torch.Tensor:
        """[B, C, L] -> float64 [C]: short sums as they are, their sum in float64."""
        return x.sum(2).double().sum(0)

    def over(vector: torch.Tensor) -> torch.Tensor:
        return vector[None, :, None]

    def sums(x: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """Sums of x - center and of its square: float64 [2, C]."""
        offset = wide(x) - over(center)
        return torch.stack([total(offset), total(offset * offset)])

    def normalise(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """act(x * scale + shift) in x's dtype."""
        return activation.of(wide(x) * over(scale) + over(shift)).to(x.dtype)

    def gradient_sums(dy, x, mean, inverse_std, scale, shift):  # type: ignore[no-untyped-def]
        """Sums of dz and of dz times the normalised x, z = x * scale + shift: float64 [2, C]."""
        x = wide(x)
        dz = activation.gradient(x * over(scale) + over(shift), wide(dy))
        return torch.stack([total(dz), total(dz * ((x - over(mean)) * over(inverse_std)))])

    def gradient_input(dy, x, mean, inverse_std, scale, shift, mean_dz, mean_dz_x):  # type: ignore[no-untyped-def]
        """scale * (dz - mean_dz - normalised x * mean_dz_x) in x's dtype."""
        dtype, x = x.dtype, wide(x)
        dz = activation.gradient(x * over(scale) + over(shift), wide(dy))
        through_statistics = over(mean_dz) + (x - over(mean)) * over(inverse_std) * over(mean_dz_x)
        return ((dz - through_statistics) * over(scale)).to(dtype)

    if mode == "eager":
        return Loops(sums, normalise, gradient_sums, gradient_input)
    compiled = [torch.compile(f, dynamic=True) for f in (sums, normalise, gradient_sums, gradient_input)]
    return Loops(*compiled)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [B, C] or [B, C, H, W] as [B', C, L] without a copy, where its memory is contiguous or channels-last."""
    if x.ndim == 2:
        return x[:, :, None]
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(0, 1).permute(0, 2, 1)
    return x.flatten(2)


def unrows(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: a fresh y [B', C, L] to like's shape and strides.

    Not a view, in autograd's eyes: a custom function may not return one that is modified in place later.
    """
    assert y.stride() == rows(like).stride() or min(y.shape) < 2, "the loops keep the layout"
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), like.shape, like.stride())
