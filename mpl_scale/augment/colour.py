"""Operations that change pixel values by an amount: PIL's enhancers, posterize, solarize and invert.

Enhancers blend with a degenerate image d: d + f (x - d). PIL truncates a float32 blend; with f a multiple of 1/4096
that sum is exact, so the integer form below is PIL's result bit for bit.

Magnitudes are AutoAugment's ranges (Cubuk et al. 2019, Table 6), arranged so that distortion grows with the magnitude,
as a uniformly drawn magnitude needs. The TF code released with RandAugment maps some the other way round (enhance
0.1 + 1.8 m, posterize int(4 m) bits), so that magnitude 0 is its strongest posterize.
"""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment.registry import per_image, register_op

_ONE = 4096


def enhance_factor(strength: np.ndarray) -> np.ndarray:
    """PIL's enhancement factor, 1 + 0.9 strength in steps of 1/4096, as int64 multiples of 1/4096."""
    return np.round((1 + 0.9 * strength) * _ONE).astype(np.int64)


def _blend(degenerate: torch.Tensor | int, images: torch.Tensor, strength: np.ndarray) -> torch.Tensor:
    factor = per_image(enhance_factor(strength), images)
    blended = (images.int() - degenerate).mul_(factor).add_(degenerate * _ONE).bitwise_right_shift_(12)
    return blended.clamp_(0, 255).to(torch.uint8)


def _luminance(images: torch.Tensor) -> torch.Tensor:
    """PIL's mode "L" (ITU-R 601-2 in 16-bit fixed point), int32 [B, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@register_op("brightness")
def brightness(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageEnhance.Brightness(1 + 0.9 strength): blend with black."""
    return _blend(0, images, strength)


@register_op("color")
def color(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageEnhance.Color(1 + 0.9 strength): blend with the grey image."""
    return _blend(_luminance(images), images, strength)


@register_op("contrast")
def contrast(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageEnhance.Contrast(1 + 0.9 strength): blend with the rounded mean luminance."""
    luminance = _luminance(images).flatten(1)
    pixels = luminance.shape[1]
    mean = (2 * luminance.sum(1) + pixels) // (2 * pixels)
    return _blend(mean.int().view(-1, 1, 1, 1), images, strength)


@register_op("sharpness")
def sharpness(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageEnhance.Sharpness(1 + 0.9 strength): blend with ImageFilter.SMOOTH, which keeps the border pixels."""
    smooth = images.int()
    if min(images.shape[2:]) > 2:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # the kernel sums to 13; rounded to nearest, never a tie
    return _blend(smooth, images, strength)


@register_op("posterize")
def posterize(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageOps.posterize(bits), bits = 8 - floor(4 |strength|): 8 down to 4 kept."""
    dropped = np.floor(4 * np.abs(strength)).astype(np.int64)
    return images & per_image(256 - (1 << dropped), images, dtype=torch.uint8)


@register_op("solarize")
def solarize(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageOps.solarize(threshold), threshold = 256 - floor(256 |strength|): pixels from it on are inverted."""
    threshold = per_image(256 - np.floor(256 * np.abs(strength)).astype(np.int64), images)
    return torch.where(images < threshold, images, 255 - images)


@register_op("invert")
def invert(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageOps.invert; has no magnitude."""
    return 255 - images
