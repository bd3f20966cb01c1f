"""Geometric operations: PIL's Image.transform(AFFINE) with nearest sampling, in its own 16-bit fixed point.

Output pixel (x, y) shows input pixel floor(a (x + 1/2) + b (y + 1/2) + c), floor(d (x + 1/2) + e (y + 1/2) + f) for
PIL's data = (a, b, c, d, e, f); outside the image it shows `fill`. Magnitudes are AutoAugment's ranges (Cubuk et al.
2019, Table 6): shear 0.3, translate 100/331 of the side in whole pixels, rotate 30 degrees.
"""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment.registry import register_op

SHEAR = 0.3
TRANSLATE = 100 / 331  # AutoAugment: 100 pixels of a 331 pixel image
ROTATE_DEGREES = 30


def transform(images: torch.Tensor, matrices: np.ndarray, *, fill: int) -> torch.Tensor:
    """Image.transform(size, AFFINE, matrix, NEAREST, fillcolor=(fill, fill, fill)) of each image.

    Args:
        images: uint8 [B, 3, H, W].
        matrices: float64 [B, 6] on the host, PIL's `data`.
        fill: value of pixels from outside.
    """
    batch, channels, height, width = images.shape
    centred = matrices.copy()  # PIL samples at pixel centres
    centred[:, [2, 5]] += 0.5 * matrices[:, [0, 3]] + 0.5 * matrices[:, [1, 4]]
    fixed = torch.from_numpy(np.floor(centred * 65536 + 0.5).astype(np.int64)).to(images.device)
    per_x, per_y, offset = fixed.view(batch, 2, 3, 1, 1).unbind(2)  # each [B, (x, y), 1, 1]
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    source_x, source_y = ((per_x * x + per_y * y + offset) >> 16).unbind(1)  # each [B, H, W]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = (source_y * width + source_x).mul_(inside).view(batch, 1, -1).expand(-1, channels, -1)
    sampled = images.flatten(2).gather(2, index).view_as(images)
    return sampled.masked_fill_(~inside[:, None], fill)


def _identity(count: int) -> np.ndarray:
    return np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (count, 1))


def _pixels(strength: np.ndarray, side: int) -> np.ndarray:
    """Whole pixels, float64 [B]."""
    return np.round(strength * TRANSLATE * side)


@register_op("shear_x")
def shear_x(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """data = (1, 0.3 strength, 0, 0, 1, 0)."""
    matrices = _identity(len(images))
    matrices[:, 1] = SHEAR * strength
    return transform(images, matrices, fill=fill)


@register_op("shear_y")
def shear_y(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """data = (1, 0, 0, 0.3 strength, 1, 0)."""
    matrices = _identity(len(images))
    matrices[:, 3] = SHEAR * strength
    return transform(images, matrices, fill=fill)


@register_op("translate_x")
def translate_x(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """data = (1, 0, pixels, 0, 1, 0), pixels = round(strength * width * 100/331)."""
    matrices = _identity(len(images))
    matrices[:, 2] = _pixels(strength, images.shape[3])
    return transform(images, matrices, fill=fill)


@register_op("translate_y")
def translate_y(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """data = (1, 0, 0, 0, 1, pixels), pixels = round(strength * height * 100/331)."""
    matrices = _identity(len(images))
    matrices[:, 5] = _pixels(strength, images.shape[2])
    return transform(images, matrices, fill=fill)


@register_op("rotate")
def rotate(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """Image.rotate(30 strength, NEAREST, fillcolor=fill): counter-clockwise degrees about the centre."""
    angle = -np.radians(ROTATE_DEGREES * strength)
    cosine, sine = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    centre_x, centre_y = images.shape[3] / 2, images.shape[2] / 2
    shift_x = -cosine * centre_x - sine * centre_y + centre_x
    shift_y = sine * centre_x - cosine * centre_y + centre_y
    return transform(images, np.stack([cosine, sine, shift_x, -sine, cosine, shift_y], axis=1), fill=fill)
