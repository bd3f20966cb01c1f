"""Dropout and drop-path of torch and timm, given the masks that the package draws: by step, site and global row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpl_scale.philox import uniform


def give_masks(net: nn.Module, *, seed: int, stream: int, step: int, rows: torch.Tensor) -> None:
    """Of one pass, for every layer that drops; sites are counted in the order of the module tree."""
    layers = [m for m in net.modules() if isinstance(m, nn.Dropout) or type(m).__name__ == "DropPath"]
    for site, layer in enumerate(layers):
        give_mask(layer, site, seed=seed, stream=stream, step=step, rows=rows)


def give_mask(layer: nn.Module, site: int, *, seed: int, stream: int, step: int, rows: torch.Tensor) -> None:
    """Let a layer multiply by Philox's mask of its site: an element's own, or one for the row if it is a drop-path."""
    path: Any = getattr(layer, "drop_prob", None)
    rate: Any = getattr(layer, "p", path)
    number = {"seed": seed, "stream": (stream << 16) + site, "step": torch.tensor(step), "rows": rows}

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not rate:
            return x
        shape = x.shape if path is None else (len(rows), *(1,) * (x.ndim - 1))
        noise = uniform(**number, columns=x.numel() // len(rows) if path is None else 1)
        return x * (noise.reshape(shape) >= rate) / (1 - rate)

    layer.forward = forward  # type: ignore[method-assign]


def drop_nothing(net: nn.Module) -> None:
    """As a pass without dropout."""
    for layer in net.modules():
        if isinstance(layer, nn.Dropout) or type(layer).__name__ == "DropPath":
            layer.forward = lambda x: x
