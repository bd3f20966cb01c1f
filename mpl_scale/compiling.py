"""torch.compile of a function whose tensors come in any size: one variant for all of them."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The function compiled by inductor with symbolic sizes, apart from every other function compiled here.

    The compiler bounds the variants of each code object and runs what exceeds the bound eagerly, with one warning in
    the log. Closures made by the same `def` share a code object, so each gets a copy. Callers pass detached tensors:
    each size of an `nn.Parameter` is a variant of its own, and so is each size of the tensor that a view is a view of.

    Args:
        function: with constants in its closure or as arguments; not a bound method.
        options: inductor's.
    """
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=True, options=options)
