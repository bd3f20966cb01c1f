"""From width partition to batch partition in the middle of a network.

Deep stages have fewer columns than a kernel: a rank then receives more than it owns. From such a stage on every rank
takes whole images of its share of the group's batch: one all-to-all at the stage, one gather of the logits at the
end. Statistics of batch norm stay those of the whole batch (weighted by element count), randomness stays keyed by
global rows, and a batch smaller than the group leaves some ranks with no rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpl_scale.models.passes import Pass, Passes
from mpl_scale.spatial.halo import WidthGroup, gather_rows, to_rows
from mpl_scale.spatial.layout import Bounds, balanced, slices
from mpl_scale.spatial.trace import Layout

_NESTED = ("blocks", "stages", "features")


def stages(model: nn.Module, layout: Layout) -> list[str]:
    """Paths that switch_at may name, in the order they run: top-level modules, and stages inside blocks or features."""
    names = []
    for name, child in model.named_children():
        nested = name in _NESTED and any(True for _ in child.children())
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if nested else [name]
    return sorted((name for name in names if name in layout.entries), key=list(layout.entries).index)


def choose_switch(model: nn.Module, layout: Layout, switch_at: str) -> str | None:
    """The path of the stage to switch at, or None.

    `auto`: the first stage that some rank enters with fewer columns than the stage's widest kernel has.
    """
    names = stages(model, layout)
    if switch_at == "never":
        return None
    if switch_at != "auto":
        if switch_at not in names:
            raise ValueError(f"switch_at = {switch_at!r}: not a stage; use auto, never, or one of {', '.join(names)}")
        return switch_at
    for name in names:
        narrowest = min(stop - start for start, stop in slices(layout.entries[name]))
        if narrowest < _widest_kernel(layout, name):
            return name
    return None


def _widest_kernel(layout: Layout, stage: str) -> int:
    inside = (site for path, site in layout.sites.items() if path == stage or path.startswith(f"{stage}."))
    return max((site.split.window.extent for site in inside if site.split.window), default=1)


class Switch:
    """The two hooks of a switched model."""

    def __init__(self, *, columns: Bounds, ranks: WidthGroup, passes: Passes) -> None:
        self.columns, self.ranks, self.passes = columns, ranks, passes
        self.batch, self.inside = 0, False
        self.outer: Pass | None = None

    def install(self, model: nn.Module, stage: nn.Module) -> None:
        """Switch where `stage` is entered, gather where `model` is left."""
        stage.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave)

    def enter(self, stage: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Own columns of all rows -> all columns of own rows, and the pass's rows narrowed alike."""
        x, current = args[0], self.passes.current
        start, stop = slices(self.columns)[self.ranks.rank]
        if x.shape[3] != stop - start:
            raise ValueError(
                f"rank {self.ranks.rank} of the width group holds {x.shape[3]} columns at the switch, but its layout"
                f" says {stop - start}; feed every rank the columns of input_columns()"
            )
        self.batch, self.outer, self.inside = x.shape[0], current, True
        if current is not None:
            low, high = slices(balanced(self.batch, self.ranks.size))[self.ranks.rank]
            assert current.rows.shape[0] == self.batch, "Pass.rows must be the rows of the whole width group"
            self.passes.current = replace(current, rows=current.rows[low:high])
        return to_rows(x, columns=self.columns, ranks=self.ranks), *args[1:]

    def leave(self, model: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        """Logits of own rows -> of all rows, on every rank."""
        assert self.inside, "the model ran without its switched stage"
        self.passes.current, self.outer, self.inside = self.outer, None, False
        return gather_rows(logits, batch=self.batch, ranks=self.ranks)
