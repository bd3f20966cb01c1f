"""The strong view with fixed shapes: every image goes through every operation, most of them with no effect.

The host writes the parameters of a batch into one int32 tensor [U, S * columns], a row an image, and they reach the
device in one transfer. What follows is a pure function of tensors: it neither reads a device value on the host nor
moves a tensor to the device, and its operators do not depend on what was drawn. So a GPU's host queues the same 80
operators for every step, and a CUDA graph can contain them.

One step applies one operation to each image, as three passes that are exact where they change nothing:

- blend with the grey, the smoothed or the partner's image; factor 1 (or a partner's share of 0) returns the image;
- a table of 256 entries per channel: a straight line from some level on, a mask of bits, a stretched or equalised
  histogram;
- an affine map in PIL's fixed point, and a square of one value.

The bytes are those of the operations in affine.py, colour.py, cutout.py and histogram.py, whose docstrings say why
they are PIL's. Passes that no operation of the list needs are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mpl_scale.augment.colour import luminance, mean_level
from mpl_scale.augment.histogram import count_levels, equalized_tables, stretched_tables
from mpl_scale.augment.lookup import LEVELS
from mpl_scale.augment.parameters import BITS, BLEND, COLUMNS, LINE, MATRIX, SQUARE, STEP, TABLE

LONGEST_SIDE = 1 << 13
"""Pixels: shifts of three times as many, the most that a config can ask for, fit 32 bits in fixed point."""
_NUMBERS = 1 << 22
"""Numbers of the images treated at once: temporary memory is some 30 bytes for each of them."""


@dataclass(frozen=True)
class StaticView:
    """The strong view as a function of tensors.

    Attributes:
        steps: the parameters, by their names in `STEP`, that each step may change from `NONE`.
        fill: value of pixels that come from outside the image.
    """

    steps: tuple[frozenset[str], ...]
    fill: int

    def __call__(
        self, images: torch.Tensor, parameters: torch.Tensor, partners: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The strong views.

        Args:
            images: uint8 [U, 3, H, W].
            parameters: int32 [U, S * COLUMNS], S rows of `STEP` for each image, on the images' device.
            partners: uint8 [U, 3, H, W], the images to mix in; None: every `share` is 0.

        Returns:
            uint8 [U, 3, H, W].
        """
        count = max(1, _NUMBERS // max(1, images.shape[1:].numel()))
        every = (images, parameters, images if partners is None else partners)
        parts = zip(*(tensor.split(count) for tensor in every), strict=True)
        return torch.cat([self._view(*part) for part in parts]) if len(images) > count else self._view(*every)

    def _view(self, images: torch.Tensor, parameters: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        grid = _Grid(images)
        for number, used in enumerate(self.steps):
            own = _Parameters(parameters[:, number * COLUMNS : (number + 1) * COLUMNS])
            if used & (BLEND | TABLE):
                images = _colours(images, own, used, grid, partners)
            if used & MATRIX:
                images = _mapped(images, own.span("a", "f"), grid, self.fill)
            if used & SQUARE:
                images = _filled(images, own.span("top", "right"), grid, self.fill)
        return images


class _Parameters:
    """Columns of a step, int32 [B, COLUMNS], by name."""

    def __init__(self, columns: torch.Tensor) -> None:
        self._columns = {np.dtype(np.int32): columns, np.dtype(np.float32): columns.view(torch.float32)}

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter by name, [B, 1]."""
        return self.span(name, name)

    def span(self, first: str, last: str) -> torch.Tensor:
        """Adjacent columns of one type: [B, n]."""
        start, stop = STEP.names.index(first), STEP.names.index(last) + 1  # type: ignore[union-attr]
        return self._columns[STEP[first]][:, start:stop]


class _Grid:
    """Coordinates and levels, made on the device once a call."""

    def __init__(self, images: torch.Tensor) -> None:
        self.height, self.width = images.shape[2:]
        self.places = torch.arange(max(self.height, self.width), device=images.device)
        self.levels = torch.arange(LEVELS, device=images.device, dtype=torch.float32)


def _colours(
    images: torch.Tensor, own: _Parameters, used: frozenset[str], grid: _Grid, partners: torch.Tensor
) -> torch.Tensor:
    """The blends, then the tables: an image takes part in one of them, so each may read what the other left."""
    if not used & (BLEND | {"of_mean"}):
        return _looked_up(images, own, used, grid, None)
    wide = images.float()
    grey = luminance(wide) if used & {"color", "of_mean"} else wide
    mean = mean_level(grey.sum((1, 2, 3), dtype=torch.float64), images) if "of_mean" in used else None
    if used & BLEND:
        if "color" in used:
            wide = torch.lerp(grey, wide, own["color"][..., None, None])
        if "sharpness" in used and min(grid.height, grid.width) > 2:
            inner = wide[:, :, 1:-1, 1:-1]
            smooth = F.avg_pool2d(wide, 3, 1, divisor_override=1)  # sums of whole numbers, exact
            smooth.add_(inner, alpha=4).mul_(1 / 13).round_()
            torch.lerp(smooth, inner, own["sharpness"][..., None, None], out=inner)
        if "share" in used:
            wide = torch.lerp(wide, partners.float(), own["share"][..., None, None])
        images = wide.clamp_(0, LEVELS - 1).to(torch.uint8)
    return _looked_up(images, own, used, grid, mean) if used & TABLE else images


def _looked_up(
    images: torch.Tensor, own: _Parameters, used: frozenset[str], grid: _Grid, mean: torch.Tensor | None
) -> torch.Tensor:
    """Look every pixel up in the table of its image and channel; mean: float32 [B], the mean luminance."""
    flat, table = images.flatten(2), grid.levels[None]
    index = flat.long()
    if used & LINE:
        offset = own["offset"] if mean is None else own["offset"] + own["of_mean"] * mean[:, None]
        table = torch.where(table >= own["first"], own["slope"] * table + offset, table).clamp_(0, LEVELS - 1)
    table = table.to(torch.uint8)
    if "mask" in used:
        table = table & own["mask"].to(torch.uint8)
    table = table[:, None]
    if "stretch" in used:
        tables = stretched_tables(flat.amin(2, keepdim=True), flat.amax(2, keepdim=True))
        table = torch.where(own["stretch"][..., None] > 0, tables, table)
    if "equalize" in used and flat.shape[2] >= LEVELS:
        tables = equalized_tables(count_levels(index), flat.amax(2, keepdim=True), images)
        table = torch.where(own["equalize"][..., None] > 0, tables, table)
    return table.expand(*flat.shape[:2], LEVELS).gather(2, index).view(images.shape)


def _mapped(images: torch.Tensor, matrix: torch.Tensor, grid: _Grid, fill: int) -> torch.Tensor:
    """`affine.transform`, in 64 bits, which a gather wants its index in. matrix: int32 [B, 6]."""
    height, width = grid.height, grid.width
    padded = F.pad(images, (1, 1, 1, 1), value=fill)
    along_x, along_y, start = matrix.long().view(len(matrix), 2, 3).split(1, dim=2)
    lines = (along_x * grid.places[:width] + start)[:, :, None] + (along_y * grid.places[:height])[..., None]
    x, y = lines.bitwise_right_shift_(BITS).unbind(1)
    index = x.clamp_(0, width + 1).add_(y.clamp_(0, height + 1), alpha=width + 2)
    return padded.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


def _filled(images: torch.Tensor, square: torch.Tensor, grid: _Grid, fill: int) -> torch.Tensor:
    """`cutout.cutout`. square: int32 [B, 4]."""
    first, last = square[..., None].split(2, dim=1)
    inside = (grid.places >= first) & (grid.places < last)  # [B, 2, longer side]: rows, columns
    rows, columns = inside[:, 0, : grid.height], inside[:, 1, : grid.width]
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], fill)
