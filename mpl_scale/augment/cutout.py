"""Cutout (DeVries and Taylor 2017): a square of one value, at the end of the strong view or as an operation."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import magnitudes
from mpl_scale.augment.registry import Given, Values, on_device, register_op


def cutout(images: torch.Tensor, sides: np.ndarray, *, centres: np.ndarray, fill: int) -> torch.Tensor:
    """Fill a square centred on a uniformly drawn pixel; the part outside the image is lost.

    Args:
        images: uint8 [B, 3, H, W].
        sides: whole numbers [B], pixels.
        centres: float64 [B, 2] in (0, 1), the centre's row and column as shares of the height and width.
        fill: value inside the square.
    """
    height, width = images.shape[2:]
    bounds = _bounds(sides, centres, (height, width))
    inside_y, inside_x = (
        _inside(np.arange(side), bounds[:, axis, None], bounds[:, axis + 2, None])
        for axis, side in enumerate((height, width))
    )
    rows, columns = (on_device(inside, images.device) for inside in (inside_y, inside_x))
    mask = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]: 255 inside
    return (images & ~mask).bitwise_or_(mask & fill)


def square(sides: np.ndarray, centres: np.ndarray, size: tuple[int, int]) -> Values:
    """The square of `cutout` for static.py."""
    return {"square": _bounds(sides, centres, size)}


def _bounds(sides: np.ndarray, centres: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The square's first row and column, and those after its last: whole numbers, float64 [B, 4]."""
    first = np.floor(centres * size) - sides[:, None] // 2
    return np.concatenate([first, first + sides[:, None]], axis=1)


def _inside(position: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """255 in [first, end) and 0 elsewhere, uint8 [B, length]."""
    return np.where((position >= first) & (position < end), 255, 0).astype(np.uint8)


@register_op("cutout", amount=magnitudes.side, static=square)
def cutout_op(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Cutout with a side of `amount` pixels around `given.centres`."""
    assert given.centres is not None
    return cutout(images, amount, centres=given.centres, fill=given.fill)
