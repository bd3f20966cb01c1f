"""Recomputation of a block by fairscale's activation checkpointing. The only file that imports fairscale.

fairscale exempts torch's own batch norm from the first run and lets it learn in the second; ours learns in the first
and not in the second, as everywhere in this package. Its wrapper replaces a module's forward for good, and a deep copy
of it would run the original's weights: so what is wrapped is a fresh holder of each call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import nn


class _Call(nn.Module):
    """One call of a block: the first run as it is, the second inside `repeat`."""

    def __init__(self, block: nn.Module, plain: Callable[..., torch.Tensor], repeat: AbstractContextManager[None]):
        super().__init__()
        self.block, self._plain, self._repeat, self._ran = block, plain, repeat, False

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        if not self._ran:
            self._ran = True
            return self._plain(*inputs, **named)
        with self._repeat:
            return self._plain(*inputs, **named)


def run_again(
    block: nn.Module,
    plain: Callable[..., torch.Tensor],
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    *,
    repeat: AbstractContextManager[None],
    offload: bool,
) -> torch.Tensor:
    """The block's output; backward runs it again.

    Args:
        block: whose parameters they are.
        plain: its forward.
        inputs: tensors and other arguments.
        named: the same, by name.
        repeat: entered for the second run.
        offload: keep the inputs in the host's memory until then.
    """
    call: Any = checkpoint_wrapper(_Call(block, plain, repeat), offload_to_cpu=offload)
    return call(*inputs, **named)
