"""The registry of partition rules: what every layer does with a slice of the columns.

A rule is a subclass of `SplitLayer` under the full class name of the layer it splits; the layer keeps its parameters,
hooks and state_dict keys, only its class changes. Layers that treat every column alone are listed as `columnwise`.
Names instead of classes, because importing timm costs seconds. A class without a rule is refused: a subclass has a
forward of its own, so it needs a rule of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from mpl_scale.spatial.halo import WidthGroup, exchange
from mpl_scale.spatial.layout import Bounds, Route, Share, Window, crop, messages, route, slices


@dataclass(frozen=True)
class Split:
    """How one layer lies on the ranks.

    inputs, outputs: who owns its columns before and behind it; outputs None: every rank holds the whole output.
    reads: what each rank reads of the input; None: its own columns.
    held: what each rank holds of the input already, if more than its own columns (block-input halos); no message then.
    expands: the output covers every column it reads, not its outputs alone (block-input halos).
    window: the kernel along the width, for tables.
    """

    inputs: Bounds
    outputs: Bounds | None
    reads: tuple[Share, ...] | None = None
    held: tuple[Share, ...] | None = None
    expands: bool = False
    window: Window | None = None

    @property
    def columns(self) -> int:
        """Width of the whole input."""
        return self.inputs[-1]

    def route(self, rank: int) -> Route | None:
        """How that rank comes by what it reads."""
        if self.reads is None:
            return None
        return route(self.inputs, self.reads, rank) if self.held is None else crop(self.held[rank], self.reads[rank])

    def messages(self) -> dict[tuple[int, int], int]:
        """Columns sent from rank to rank."""
        return {} if self.reads is None or self.held is not None else messages(self.inputs, self.reads)


class SplitLayer(nn.Module, ABC):
    """Base of the split layers: the original module with another class, and its place in the width group."""

    split: Split
    ranks: WidthGroup
    path: str
    plain: type[nn.Module]
    route: Route | None

    @classmethod
    @abstractmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        """The split of `module` with inputs owned so; raises ValueError (without the path) where there is none."""

    @classmethod
    def needed(cls, module: Any, split: Split) -> bool:
        """Whether the layer needs another forward at all."""
        return True

    def read(self, x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Own columns [B, C, H, own] -> the columns this rank reads, with the padding along the width."""
        assert self.route is not None
        return exchange(x, route=self.route, ranks=self.ranks, fill=fill, path=self.path)

    def trim(self, y: torch.Tensor) -> torch.Tensor:
        """Drop the column that a rank without outputs computed from padding."""
        assert self.split.outputs is not None
        assert self.route is not None
        if self.split.expands:
            return y if self.route.reads else y[..., :0]
        start, stop = slices(self.split.outputs)[self.ranks.rank]
        assert y.shape[3] == max(stop - start, 1), f"{self.path}: {y.shape[3]} columns, not {stop - start}"
        return y if stop > start else y[..., :0]


RULES: dict[str, type[SplitLayer]] = {}
COLUMNWISE: set[str] = set()
Layer = TypeVar("Layer", bound=type[SplitLayer])


def partition_rule(*names: str) -> Callable[[Layer], Layer]:
    """Make a SplitLayer the rule of the classes with these full names ("torch.nn.modules.conv.Conv2d")."""

    def add(layer: Layer) -> Layer:
        for name in names:
            if name in RULES or name in COLUMNWISE:
                raise ValueError(f"partition rule for {name} is registered twice")
            RULES[name] = layer
        return layer

    return add


def columnwise(*names: str) -> None:
    """Declare that layers of these classes treat every column alone: they run on a slice as they are."""
    for name in names:
        if name in RULES or name in COLUMNWISE:
            raise ValueError(f"partition rule for {name} is registered twice")
        COLUMNWISE.add(name)


def class_name(module: nn.Module) -> str:
    """The name under which the rule of a module is registered."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def has_rule(module: nn.Module) -> bool:
    """Whether a rule answers for the module and everything inside it."""
    return class_name(module) in RULES or class_name(module) in COLUMNWISE


def plan(module: nn.Module, inputs: Bounds) -> Split:
    """The split of a module that has a rule."""
    if class_name(module) in COLUMNWISE:
        return Split(inputs, inputs)
    return RULES[class_name(module)].plan(module, inputs)


def apply_rule(module: nn.Module, *, split: Split, ranks: WidthGroup, path: str) -> None:
    """Give the module (in place) the forward of its rule on this rank."""
    rule = RULES.get(class_name(module))
    if rule is None or not rule.needed(module, split):
        return
    layer: Any = module
    layer.plain, layer.__class__ = type(module), rule
    layer.split, layer.ranks, layer.path = split, ranks, path
    layer.route = split.route(ranks.rank)
