"""Which buffers of a model are state, and which are constants of its builder (masks, tables of positions)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def stateful_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers by name, those that a state_dict has: the others are the same in every network of the model."""
    constants = {f"{path}{name}" for path, _, name in _constants(module)}
    return {name: buffer for name, buffer in module.named_buffers() if name not in constants}


def cast_constants(module: nn.Module, dtype: torch.dtype) -> None:
    """Give floating-point constants the dtype of the weights, in place; batch norm's averages are state."""
    for _, layer, name in _constants(module):
        buffer = layer._buffers[name]
        if buffer is not None and buffer.is_floating_point():
            layer._buffers[name] = buffer.to(dtype)


def _constants(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, layer in module.named_modules():
        for name in layer._non_persistent_buffers_set:
            yield f"{path}." if path else "", layer, name
