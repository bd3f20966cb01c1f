"""Geometric operations: PIL's Image.transform(AFFINE) with nearest sampling, in its own 16-bit fixed point.

Output pixel (x, y) shows input pixel floor(a (x + 1/2) + b (y + 1/2) + c), floor(d (x + 1/2) + e (y + 1/2) + f) for
PIL's data = (a, b, c, d, e, f); outside the image it shows `fill`. A shear along the width moves whole rows and a
translation moves whole images: they copy windows of a padded image. Only a shear along the height and a rotation look
up every pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mpl_scale.augment import large, magnitudes
from mpl_scale.augment.large import OfOne
from mpl_scale.augment.lookup import sample
from mpl_scale.augment.parameters import BITS, affine_map
from mpl_scale.augment.registry import Amount, Apply, Given, bands, on_device, register_op

_LARGEST_INT32 = 4096
"""Sides up to it keep sums of two 16-bit fixed-point coordinates of slope 2 within 32 bits."""


def translate(images: torch.Tensor, right: np.ndarray, down: np.ndarray, *, fill: int) -> torch.Tensor:
    """Output pixel (x, y) shows input pixel (x + right, y + down); right, down: whole numbers [B] on the host."""
    height, width = images.shape[2:]
    result = torch.full_like(images, fill)
    for image, moved, x, y in zip(images, result, right.astype(int).tolist(), down.astype(int).tolist(), strict=True):
        if abs(x) < width and abs(y) < height:
            rows, columns = slice(max(-y, 0), height - max(y, 0)), slice(max(-x, 0), width - max(x, 0))
            moved[:, rows, columns] = image[:, max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
    return result


def move_rows(images: torch.Tensor, *, right: np.ndarray, fill: int) -> torch.Tensor:
    """Output pixel (x, y) shows input pixel (x + right[y], y): whole rows are copied.

    Args:
        images: uint8 [B, 3, H, W].
        right: int64 [B, H] on the host, pixels.
        fill: value of pixels from outside.
    """
    batch, channels, height, width = images.shape
    right = right.clip(-width, width)
    before, after = max(0, -int(right.min())), max(0, int(right.max()))
    stride, planes = before + width + after, batch * channels
    padded = images.new_full((batch, channels, height, stride), fill)
    padded[..., before : before + width] = images
    first = np.arange(0, planes * height * stride, stride).reshape(batch, channels, height)
    start = on_device((first + before + right[:, None]).reshape(-1), images.device)
    return padded.view(-1).unfold(0, width, 1).index_select(0, start).view_as(images)


def move_columns(images: torch.Tensor, *, down: np.ndarray, fill: int) -> torch.Tensor:
    """Output pixel (x, y) shows input pixel (x, y + down[x]); down: int64 [B, W] on the host."""
    batch, channels, height, width = images.shape
    down = down.clip(-height, height)
    above, below = max(0, -int(down.min())), max(0, int(down.max()))
    padded = images.new_full((batch, channels, above + height + below, width), fill)
    padded[:, :, above : above + height] = images
    top = on_device(((down + above) * width + np.arange(width)).astype(np.int32), images.device)
    first = torch.arange(0, height * width, width, device=images.device, dtype=torch.int32)[:, None]
    planes, result = padded.flatten(2), torch.empty_like(images)
    for band in bands(images):
        sample(planes, first[band] + top[:, None], out=result[:, :, band])
    return result


def transform(images: torch.Tensor, matrices: np.ndarray, *, fill: int) -> torch.Tensor:
    """Image.transform(size, AFFINE, matrix, NEAREST, fillcolor=(fill, fill, fill)) of each image.

    Args:
        images: uint8 [B, 3, H, W].
        matrices: float64 [B, 6] on the host, PIL's `data`.
        fill: value of pixels from outside.
    """
    batch, channels, height, width = images.shape
    # A frame of fill takes every coordinate from outside: clamping is cheaper than comparing and masking.
    padded = images.new_full((batch, channels, height + 2, width + 2), fill)
    padded[:, :, 1:-1, 1:-1] = images
    a, b, c, d, e, f = np.moveaxis(_fixed(matrices), 1, 0)[..., None]
    frame, x, y = 1 << BITS, np.arange(width), np.arange(height)
    lines = np.concatenate([a * x + (c + frame), b * y, d * x + (f + frame), e * y], axis=1)
    dtype = np.int32 if max(height, width) <= _LARGEST_INT32 else np.int64
    moved = on_device(lines.astype(dtype), images.device).split([width, height] * 2, dim=1)
    (column_x, column_y), (row_x, row_y) = (
        (line[:, None] for line in moved[::2]),
        (line[..., None] for line in moved[1::2]),
    )
    planes, result = padded.flatten(2), torch.empty_like(images)
    for band in bands(images):
        source_x = (column_x + row_x[:, band]).bitwise_right_shift_(BITS).clamp_(0, width + 1)
        source_y = (column_y + row_y[:, band]).bitwise_right_shift_(BITS).clamp_(0, height + 1)
        sample(planes, source_x.add_(source_y, alpha=width + 2), out=result[:, :, band])
    return result


def _fixed(matrices: np.ndarray) -> np.ndarray:
    """PIL's fixed-point coefficients, int64 [B, 6]; it samples at pixel centres."""
    centred = matrices.copy()
    centred[:, [2, 5]] += 0.5 * matrices[:, [0, 3]] + 0.5 * matrices[:, [1, 4]]
    return np.floor(centred * (1 << BITS) + 0.5).astype(np.int64)


def _sheared(amount: np.ndarray, length: int) -> np.ndarray:
    """Whole pixels by which line 0 .. length - 1 moves: int64 [B, length], in PIL's fixed point."""
    slope = np.floor(amount * (1 << BITS) + 0.5)
    offset = np.floor((0.5 + 0.5 * amount) * (1 << BITS) + 0.5)
    return (slope[:, None] * np.arange(length) + offset[:, None]).astype(np.int64) >> BITS


def _one_coefficient(name: str, coefficient: str, *, amount: Amount, of_one: OfOne) -> Callable[[Apply], Apply]:
    """Register an operation whose amount is one coefficient, a to f, of PIL's `data`."""
    return register_op(
        name,
        amount=amount,
        of_one=of_one,
        static=lambda amount, centres, size: affine_map(**{coefficient: amount}),
    )


@_one_coefficient("shear_x", "b", amount=magnitudes.shear, of_one=large.shear_x)
def shear_x(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """data = (1, amount, 0, 0, 1, 0)."""
    return move_rows(images, right=_sheared(amount, images.shape[2]), fill=given.fill)


@_one_coefficient("shear_y", "d", amount=magnitudes.shear, of_one=large.shear_y)
def shear_y(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """data = (1, 0, 0, amount, 1, 0)."""
    return move_columns(images, down=_sheared(amount, images.shape[3]), fill=given.fill)


@_one_coefficient("translate_x", "c", amount=magnitudes.columns, of_one=large.translate_x)
def translate_x(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """data = (1, 0, pixels, 0, 1, 0)."""
    return translate(images, amount, np.zeros_like(amount), fill=given.fill)


@_one_coefficient("translate_y", "f", amount=magnitudes.rows, of_one=large.translate_y)
def translate_y(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """data = (1, 0, 0, 0, 1, pixels)."""
    return translate(images, np.zeros_like(amount), amount, fill=given.fill)


def _rotation(amount: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """PIL's `data` for Image.rotate(amount): six of [B]."""
    angle = -np.radians(amount)
    cosine, sine = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    centre_x, centre_y = size[1] / 2, size[0] / 2
    shift_x = -cosine * centre_x - sine * centre_y + centre_x
    shift_y = sine * centre_x - cosine * centre_y + centre_y
    return {"a": cosine, "b": sine, "c": shift_x, "d": -sine, "e": cosine, "f": shift_y}


@register_op(
    "rotate",
    amount=magnitudes.degrees,
    of_one=large.rotate,
    static=lambda amount, centres, size: affine_map(**_rotation(amount, size)),
)
def rotate(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Image.rotate(degrees, NEAREST, fillcolor=fill): counter-clockwise about the centre."""
    matrices = np.stack(list(_rotation(amount, (images.shape[2], images.shape[3])).values()), axis=1)
    return transform(images, matrices, fill=given.fill)
