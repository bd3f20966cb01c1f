"""Cutout (DeVries and Taylor 2017): a square of one value, at the end of the strong view or as an operation."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import magnitudes
from mpl_scale.augment.registry import Given, on_device, register_op


def cutout(images: torch.Tensor, sides: np.ndarray, *, centres: np.ndarray, fill: int) -> torch.Tensor:
    """Fill a square centred on a uniformly drawn pixel; the part outside the image is lost.

    Args:
        images: uint8 [B, 3, H, W].
        sides: whole numbers [B], pixels.
        centres: float64 [B, 2] in (0, 1), the centre's row and column as shares of the height and width.
        fill: value inside the square.
    """
    height, width = images.shape[2:]
    square = square_of(sides, centres, (height, width))
    inside_y = _inside(np.arange(height), square["top"], square["bottom"])
    inside_x = _inside(np.arange(width), square["left"], square["right"])
    rows, columns = (on_device(inside, images.device) for inside in (inside_y, inside_x))
    mask = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]: 255 inside
    return (images & ~mask).bitwise_or_(mask & fill)


def square_of(sides: np.ndarray, centres: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The squares of `cutout` by their edges, whole numbers [B]: also the operation's parameters in static.py."""
    top, left = np.floor(centres.T * np.array(size)[:, None]) - sides // 2
    return {"top": top, "left": left, "bottom": top + sides, "right": left + sides}


def _inside(position: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """255 in [first, end) and 0 elsewhere, uint8 [B, length]."""
    return np.where((position >= first[:, None]) & (position < end[:, None]), 255, 0).astype(np.uint8)


@register_op("cutout", amount=magnitudes.side, static=square_of)
def cutout_op(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Cutout with a side of `amount` pixels around `given.centres`."""
    assert given.centres is not None
    return cutout(images, amount, centres=given.centres, fill=given.fill)
