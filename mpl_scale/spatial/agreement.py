"""Do the ranks of a width group hold slices of the same batch? Asked once for every new shape, before any exchange.

Exchanges have static splits: ranks that disagree would wait for each other until the time-out, or mix rows. So the
first pass of every shape compares shapes over the group; a wrong one is an error on every rank that names them all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpl_scale.spatial.halo import WidthGroup


class ShapeAgreement:
    """A forward pre-hook of a split model. columns: how many each rank of the group owns, by rank."""

    def __init__(self, *, columns: list[int], ranks: WidthGroup) -> None:
        self._columns, self._ranks = columns, ranks
        self._agreed: set[tuple[int, ...]] = set()

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Compare on a shape not seen yet. ValueError, on all ranks alike, where they disagree."""
        own = tuple(args[0].shape)
        if own in self._agreed:
            return
        mine = torch.tensor(own, device=args[0].device)
        gathered = [torch.empty_like(mine) for _ in self._columns]
        dist.all_gather(gathered, mine, group=self._ranks.group)
        shapes = [tuple(shape.tolist()) for shape in gathered]
        expected = [(*shapes[0][:3], columns) for columns in self._columns]
        if wrong := [rank for rank, shape in enumerate(shapes) if shape != expected[rank]]:
            listed = ", ".join(f"rank {rank}: {list(shape)}" for rank, shape in enumerate(shapes))
            raise ValueError(
                f"rank {' and '.join(map(str, wrong))} of the width group: not the expected slice of rank 0's batch "
                f"({listed}; columns by rank are {self._columns}); feed all the same images, cut by input_columns()"
            )
        self._agreed.add(own)
