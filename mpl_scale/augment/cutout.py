"""Cutout (DeVries and Taylor 2017): a square of one value, at the end of the strong view or as an operation."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import magnitudes
from mpl_scale.augment.registry import Given, register_op


def cutout(images: torch.Tensor, sides: np.ndarray, *, centres: np.ndarray, fill: int) -> torch.Tensor:
    """Fill a square centred on a uniformly drawn pixel; the part outside the image is lost.

    Args:
        images: uint8 [B, 3, H, W].
        sides: whole numbers [B], pixels.
        centres: float64 [B, 2] in (0, 1), the centre's row and column as shares of the height and width.
        fill: value inside the square.
    """
    height, width = images.shape[2:]
    inside_y = _inside(np.arange(height), np.floor(centres[:, :1] * height), sides[:, None])
    inside_x = _inside(np.arange(width), np.floor(centres[:, 1:] * width), sides[:, None])
    rows, columns = (torch.from_numpy(inside).to(images.device) for inside in (inside_y, inside_x))
    square = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]: 255 inside
    return (images & ~square).bitwise_or_(square & fill)


def _inside(position: np.ndarray, centre: np.ndarray, side: np.ndarray) -> np.ndarray:
    """255 within the square and 0 elsewhere, uint8 [B, length]."""
    first = centre - side // 2
    return np.where((position >= first) & (position < first + side), 255, 0).astype(np.uint8)


@register_op("cutout", amount=magnitudes.side)
def cutout_op(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Cutout with a side of `amount` pixels around `given.centres`."""
    assert given.centres is not None
    return cutout(images, amount, centres=given.centres, fill=given.fill)
