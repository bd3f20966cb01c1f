"""Forward-mode derivatives of a network along a direction in its weights: one pass, in any precision.

A pass with dual numbers computes logits and their derivative side by side; nothing of it is kept for a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def following(module: nn.Module, direction: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A context in which the module's outputs are dual tensors; `derivative_of` reads them there.

    Args:
        module: one of ours, with `passes`.
        direction: of each parameter by name, like it.
    """
    passes: Any = module.passes
    parameters = {name: getattr(*_place(module, name)) for name in direction}
    in_place = [layer for layer in module.modules() if getattr(layer, "inplace", False) is True]
    with torch.no_grad(), forward_ad.dual_level(), ExitStack() as held:
        if any(isinstance(layer, nn.Module) and hasattr(layer, "fused_attn") for layer in module.modules()):
            held.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused ones have no forward mode
        passes.follows = True
        for layer in in_place:  # an activation in place copies what its derivative reads
            layer.inplace = False  # type: ignore[assignment]
        try:
            for name, parameter in parameters.items():
                _put(module, name, forward_ad.make_dual(parameter.detach(), direction[name]))
            yield
        finally:
            passes.follows = False
            for layer in in_place:
                layer.inplace = True  # type: ignore[assignment]
            for name, parameter in parameters.items():
                _put(module, name, parameter)


def derivative_of(dual: torch.Tensor) -> torch.Tensor:
    """The derivative of an output along the direction; zeros where it does not depend on the weights."""
    tangent = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """In the place of a parameter, whatever it is: `setattr` takes parameters alone."""
    owner, last = _place(module, name)
    owner._parameters[last] = value  # type: ignore[assignment]
