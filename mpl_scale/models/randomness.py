"""Refuses a forward pass that draws torch's random numbers: they depend on how rows lie on ranks, and a repeated pass
draws others. Dropout and drop-path modules are replaced (layers.py); what is left is drawn by a model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OnlyOurs(TorchDispatchMode):
    """While it is entered, an operator that draws random numbers raises ValueError with its name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            raise ValueError(f"it draws random numbers with {func.name()}, which differ with the number of ranks")
        return func(*args, **kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Fused attention has the tag too, and draws nothing at rate 0."""
    names = [argument.name for argument in func._schema.arguments]
    return "dropout_p" not in names or bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0))
