"""Operations that change pixel values by an amount: PIL's enhancers, posterize, solarize, invert; sample pairing.

Enhancers blend with a degenerate image d: d + f (x - d), which PIL computes in float32 and truncates. With f a multiple
of 1/4096 (and below 8) every term and sum is exact in float32, in any order: the result is PIL's bit for bit. Where d
is one level for the whole image, the blend is a table of 256 entries.
"""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import large, magnitudes
from mpl_scale.augment.lookup import LEVELS, look_up
from mpl_scale.augment.parameters import Static, Values
from mpl_scale.augment.registry import Given, bands, on_device, per_image, register_op

_STEPS = 4096
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def _rounded(factor: np.ndarray) -> np.ndarray:
    """The nearest multiples of 1/4096."""
    return np.round(factor * _STEPS) / _STEPS


def _factor(amount: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """f, multiples of 1/4096, float32 [B, 1, 1, 1]."""
    return per_image(_rounded(amount), images, dtype=np.float32)


def _blend(degenerate: torch.Tensor, wide: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """d + f (x - d), truncated and clipped to 0..255; x is overwritten.

    Args:
        degenerate: float32 [B, 1 or 3, h, w], whole numbers.
        wide: float32 [B, 3, h, w], whole numbers.
        factor: f.

    Returns:
        int16 [B, 3, h, w]: on a CPU torch makes bytes of them, but not of float32, with vector instructions.
    """
    return torch.lerp(degenerate, wide, factor, out=wide).short().clamp_(0, 255)


def luminance(wide: torch.Tensor) -> torch.Tensor:
    """PIL's mode "L" (ITU-R 601-2 in 16-bit fixed point): float32 [B, 3, h, w] to [B, 1, h, w]."""
    red, green, blue = wide.split(1, dim=1)
    grey = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return grey.add_(0.5).floor_()


def mean_level(total: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The nearest level to the mean of each image's pixels, float32 [B]; total: their sum, float64 [B].

    In whole numbers: on CUDA a division by a number of the host multiplies by its reciprocal, and a half may be lost.
    """
    pixels = images.shape[2] * images.shape[3]
    return total.long().mul_(2).add_(pixels).div_(2 * pixels, rounding_mode="floor").float()


def _line(slope: np.ndarray | float, *, first: np.ndarray | float = 0.0, offset: float = 0.0) -> Values:
    """The table slope * level + offset from level `first` on."""
    return {"slope": slope, "first": first, "offset": offset}


def _blended(name: str) -> Static:
    """The blend whose factor is the parameter `name`."""
    return lambda amount, centres, size: {name: _rounded(amount)}


@register_op(
    "brightness",
    amount=magnitudes.factor,
    of_one=large.brightness,
    static=lambda amount, centres, size: _line(_rounded(amount)),
)
def brightness(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Brightness(factor): blend with black."""
    tables = np.minimum(_rounded(amount)[:, None, None] * np.arange(LEVELS), 255).astype(np.uint8)
    return look_up(images, on_device(tables, images.device))


@register_op("color", amount=magnitudes.factor, of_one=large.color, static=_blended("color"))
def color(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Color(factor): blend with the grey image."""
    factor, result = _factor(amount, images), torch.empty_like(images)
    for band in bands(images):
        wide = images[:, :, band].float()
        result[:, :, band] = _blend(luminance(wide), wide, factor)
    return result


def _contrasted(amount: np.ndarray, centres: np.ndarray, size: tuple[int, int]) -> Values:
    return {**_line(_rounded(amount)), "of_mean": 1 - _rounded(amount)}


@register_op("contrast", amount=magnitudes.factor, of_one=large.contrast, static=_contrasted)
def contrast(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Contrast(factor): blend with the rounded mean luminance."""
    # Sums of a row are exact in float32, those of an image are not.
    sums = [luminance(images[:, :, band].float()).sum(3).sum((1, 2), dtype=torch.float64) for band in bands(images)]
    mean = mean_level(torch.stack(sums).sum(0), images)
    factor = _factor(amount, images)
    tables = factor * torch.arange(LEVELS, device=images.device) + (1 - factor) * mean.view(-1, 1, 1, 1)
    return look_up(images, tables.clamp_(0, 255).to(torch.uint8).squeeze(2))


@register_op("sharpness", amount=magnitudes.factor, static=_blended("sharpness"))
def sharpness(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Sharpness(factor): blend with ImageFilter.SMOOTH, which keeps the border pixels."""
    factor, result = _factor(amount, images), images.clone()
    if min(images.shape[2:]) <= 2:
        return result
    inner = result[:, :, 1:-1, 1:-1]
    for band in bands(inner):
        wide = images[:, :, band.start : band.stop + 2].short()
        rows = wide[:, :, :-2] + wide[:, :, 1:-1]
        rows.add_(wide[:, :, 2:])
        total = rows[..., :-2] + rows[..., 1:-1]
        total.add_(rows[..., 2:]).add_(wide[:, :, 1:-1, 1:-1], alpha=4)
        # The kernel sums to 13: total / 13 is never halfway between two levels, nor near it by float32's rounding.
        smooth = total.float().mul_(1 / 13).round_()
        inner[:, :, band] = _blend(smooth, wide[:, :, 1:-1, 1:-1].float(), factor)
    return result


def _mask(bits: np.ndarray) -> np.ndarray:
    return 256 - 2.0 ** (8 - bits)


@register_op(
    "posterize",
    amount=magnitudes.bits,
    of_one=large.posterize,
    static=lambda amount, centres, size: {"mask": _mask(amount)},
)
def posterize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.posterize(bits): the low bits are set to 0."""
    return images & per_image(_mask(amount), images, dtype=np.uint8)


@register_op(
    "solarize",
    amount=magnitudes.threshold,
    of_one=large.solarize,
    static=lambda amount, centres, size: _line(-1.0, first=amount, offset=255.0),
)
def solarize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.solarize(threshold): pixels from it on are inverted."""
    level = np.arange(LEVELS, dtype=np.uint8)
    tables = np.where(level >= amount[:, None], 255 - level, level)[:, None]
    return look_up(images, on_device(tables, images.device))


@register_op("invert", of_one=large.invert, static=lambda amount, centres, size: _line(-1.0, offset=255.0))
def invert(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.invert: 255 - value."""
    return ~images


@register_op("sample_pairing", amount=magnitudes.share, pairs=True, static=_blended("share"))
def sample_pairing(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Image.blend(image, partner, share) (Inoue 2018); the label stays the image's."""
    assert given.partners is not None
    factor, result = _factor(amount, images), torch.empty_like(images)
    for band in bands(images):
        result[:, :, band] = _blend(images[:, :, band].float(), given.partners[:, :, band].float(), factor)
    return result
