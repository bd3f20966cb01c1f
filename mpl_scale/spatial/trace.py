"""The layout of a whole network: one forward on the meta device that carries along who owns the columns.

Module hooks ask each layer's rule for its split. What happens between layers - a residual sum, a functional mean, a
pad - is invisible to a walk over modules, so every torch function on a width-split tensor is seen too, and only
pointwise ones pass. A network that passes has a layout; anything else is refused with its path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mpl_scale.models.batch_norm import BatchNorm
from mpl_scale.models.build import channels_of
from mpl_scale.spatial.layout import Bounds, balanced, input_columns
from mpl_scale.spatial.rules import RULES, Split, class_name, has_rule, plan

_ARITHMETIC = """add sub mul div truediv neg pow square sqrt rsqrt reciprocal abs clamp clip minimum maximum where lerp
    iadd isub imul idiv itruediv radd rsub rmul rtruediv addcmul exp log"""
_ACTIVATIONS = """relu relu6 silu sigmoid hardsigmoid hardswish hardtanh tanh gelu leaky_relu elu mish softplus"""
_COPIES = """contiguous clone detach to float double half bfloat16 type zeros_like ones_like requires_grad"""
_POINTWISE = {*_ARITHMETIC.split(), *_ACTIVATIONS.split(), *_COPIES.split()}
_OVER_CHANNELS = {"cat", "concat", "split", "chunk", "tensor_split"}
_OWNED = "columns_owned_as"
_ROWS = "rows"


@dataclass(frozen=True)
class Site:
    """One layer with a rule, where the trace met it: its split and its input [B, channels, height, columns]."""

    path: str
    split: Split
    channels: int
    height: int


@dataclass
class Layout:
    """The layers in the order they run, and who owns the columns where a module is entered.

    shapes: channels and height there, as of the sites.
    replicated: batch norms whose input every rank holds in whole, as behind a global pool.
    """

    image_size: int
    width: int
    sites: dict[str, Site] = field(default_factory=dict)
    entries: dict[str, Bounds] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    replicated: list[str] = field(default_factory=list)
    switch: str | None = None


def trace(model: nn.Module, *, image_size: int, width: int, switch: str | None = None) -> Layout:
    """The layout of `model` on square images of `image_size` pixels over `width` ranks; computes nothing.

    Args:
        model: as built, before it is split; on any device. Its mode and its values are left as they are.
        image_size: of the run, pixels.
        width: ranks of a width group.
        switch: path of the module from which on the batch is split instead of the width.

    Raises:
        ValueError: a layer or an operation that cannot be split, with its path and the rule to write.
    """
    input_columns(image_size, width)
    tracer = _Tracer(model, Layout(image_size, width, switch=switch))
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    dtype = next(model.parameters()).dtype
    shape = (1, channels_of(model), image_size, image_size)
    images = _own(torch.empty(shape, dtype=dtype, device="meta"), balanced(image_size, width))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), tracer.hooked(), tracer:
            logits = torch.func.functional_call(model, state, (images,))
    except RuntimeError as error:  # a kernel wider than its input, and the like
        raise ValueError(f"{tracer.where()}: cannot run on images of {image_size} pixels: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(_owner(logits), tuple):
        raise ValueError(f"{type(model).__name__}: its output is still split by width; end it with a global pool")
    return tracer.layout


def _own(tensor: torch.Tensor, bounds: Bounds | str | None) -> torch.Tensor:
    setattr(tensor, _OWNED, bounds)
    return tensor


def _owner(tensor: Any) -> Bounds | str | None:
    """Who owns the columns: bounds; `_ROWS`: nobody, the batch is split; None: every rank holds all."""
    return getattr(tensor, _OWNED, None)


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.paths: list[str] = []
        self.ruled: nn.Module | None = None  # the module whose rule answers now, and its split
        self.split: Split | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow the modules of the model."""
        handles = []
        for path, module in self.model.named_modules():

            def before(module: nn.Module, args: tuple[Any, ...], path: str = path) -> tuple[Any, ...] | None:
                return self.enter(module, args, path)

            handles.append(module.register_forward_pre_hook(before, prepend=True))
            handles.append(module.register_forward_hook(self.leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], path: str) -> tuple[Any, ...] | None:
        """Before a module runs: its rule answers for what is inside, unless it is a container of layers."""
        self.paths.append(path)
        owner = _owner(args[0]) if args else None
        if isinstance(module, BatchNorm) and owner is None and args[0].shape[2:].numel() == 1:
            self.layout.replicated.append(path)
        if self.ruled is not None or not isinstance(owner, tuple):
            return None
        self.layout.entries.setdefault(path, owner)
        self.layout.shapes.setdefault(path, (args[0].shape[1], args[0].shape[2]))
        if path == self.layout.switch:
            return _own(args[0].detach(), _ROWS), *args[1:]
        if not has_rule(module):
            if isinstance(module, nn.Sequential) or any(True for _ in module.children()):
                return None
            raise ValueError(
                f"{path}: {class_name(module)} has no partition rule; write one in mpl_scale/spatial: a SplitLayer"
                f' with @partition_rule("{class_name(module)}"), or columnwise(...) if columns do not mix in it'
            )
        self.ruled = module
        try:
            self.split = split = plan(module, owner)
        except ValueError as error:
            raise ValueError(f"{path}: {class_name(module)} cannot be split: {error}") from error
        site = Site(path, split, args[0].shape[1], args[0].shape[2])
        if self.layout.sites.setdefault(path, site).split != split and class_name(module) in RULES:
            raise ValueError(f"{path}: runs at two widths, and a layer has one layout; use two layers")
        return None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a module: mark its output's owners as the rule says."""
        path = self.paths.pop()
        if module is not self.ruled:
            return
        self.ruled = None
        split = self.split
        assert split is not None
        assert split.outputs is None or split.outputs[-1] == output.shape[-1], f"{path}: {split} gives {output.shape}"
        _own(output, split.outputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        owners = {_owner(leaf) for leaf in before} - {None}
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if self.ruled is not None or not owners or not results:
            return result
        name = getattr(func, "__name__", str(func))
        where = self.where()
        if len(owners) > 1:
            raise ValueError(f"{where}: `{name}` meets {self._conflict(owners)}")
        owner = owners.pop()
        if isinstance(owner, tuple) and not self._columnwise(name, args, kwargs, before):
            raise ValueError(
                f"{where}: calls `{name}` on columns that lie on several ranks; write a SplitLayer for"
                f" {class_name(self.model.get_submodule(self.paths[-1]))} under @partition_rule in mpl_scale.spatial"
            )
        for leaf in results:
            _own(leaf, owner)
        return result

    def where(self) -> str:
        """The module that runs, for errors."""
        path = self.paths[-1] if self.paths else ""
        return f"{path or type(self.model).__name__} ({class_name(self.model.get_submodule(path))})"

    def _conflict(self, owners: set[Any]) -> str:
        if _ROWS in owners:
            return (
                f"columns from before and rows from behind switch_at = {self.layout.switch!r};"
                " switch where one tensor carries the network, as at a stage"
            )
        return (
            f"columns owned in two ways, {' and '.join(map(str, sorted(owners)))}; choose another width or image size"
        )

    @staticmethod
    def _columnwise(name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        """Whether the call treats every column alone, given that some of its tensors are split."""
        if name == "__getitem__":  # of rows and channels, as x[:, :8]
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return all(isinstance(part, slice) for part in index) and all(part == slice(None) for part in index[2:])
        if name in _OVER_CHANNELS:
            dim = kwargs.get("dim", args[-1] if isinstance(args[-1], int) and len(args) > 1 else 0)
            return dim in (1, -3)
        if name.strip("_") not in _POINTWISE:
            return False
        # a factor that every rank holds must be the same for all columns
        return all(isinstance(_owner(leaf), tuple) or leaf.ndim == 0 or leaf.shape[-1] == 1 for leaf in tensors)
