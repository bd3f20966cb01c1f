"""The values that travel between layers: a batch, the step's metrics, and where a shard's elements come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

StepMetrics = Mapping[str, torch.Tensor]
"""0-d device tensors by name; read on the host only when a line is logged."""


def as_they_are(images: torch.Tensor) -> torch.Tensor:
    """The identity, for images that need no normalisation."""
    return images


@dataclass(frozen=True)
class Batch:
    """This rank's part of the global batch of one step.

    Shapes: B labelled and U unlabelled images, on the run's device: pixels, uint8 [*, 3, H, W], which take a quarter of
    what networks are given, `normalise` of a micro-batch of them; or that already, floating point (vectors [*, F]).
    Rows are global positions in the step's batch: they key the counter-based randomness (philox.py), so a row draws the
    same numbers on every layout of ranks.
    """

    labelled: torch.Tensor  # [B, 3, H, W]
    labels: torch.Tensor  # int64 [B]
    labelled_rows: torch.Tensor  # int64 [B], in [0, global B)
    weak: torch.Tensor  # [U, 3, H, W], the weakly augmented view x_u
    strong: torch.Tensor  # [U, 3, H, W], the strongly augmented view of the same images
    unlabelled_rows: torch.Tensor  # int64 [U], in [0, global U)
    labelled_distributions: torch.Tensor | None = None  # [B, K], what a trained teacher once said of x_l (appendix E)
    unlabelled_distributions: torch.Tensor | None = None  # [U, K], and of x_u
    unlabelled_ids: torch.Tensor | None = None  # int64 [U], their places in the list of unlabelled images, if asked for
    normalise: Callable[[torch.Tensor], torch.Tensor] = as_they_are  # any of the images, to floating point
    unlabelled_samples: np.ndarray | None = None  # int64 [U] on the host, sample ids of x_u: for people, not for steps

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the batch, by field; absent ones are left out."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def with_tensors(self, tensors: dict[str, Any]) -> Batch:
        """A copy with other tensors, by field."""
        return replace(self, **tensors)

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches of consecutive rows, as views; `parts` divides B and U."""
        if parts == 1:
            return [self]
        pieces = {name: value.chunk(parts) for name, value in self.tensors().items()}
        return [self.with_tensors({name: piece[index] for name, piece in pieces.items()}) for index in range(parts)]


@dataclass(frozen=True)
class Slice:
    """Where a piece of a parameter lies in an engine's local shard tensors.

    Elements [start, start + length) of the flattened parameter `name` are elements [offset, offset + length) of the
    1-D shard tensor number `shard`. Master weights, optimiser state and EMA all share this layout, which is what
    lets a checkpoint be written by one layout of ranks and read by another.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    shard: int
    offset: int
