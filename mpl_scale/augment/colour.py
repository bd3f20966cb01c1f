"""Operations that change pixel values by an amount: PIL's enhancers, posterize, solarize, invert; sample pairing.

Enhancers blend with a degenerate image d: d + f (x - d). PIL truncates a float32 blend; with f a multiple of 1/4096
that sum is exact, so the integer form below is PIL's result bit for bit. Where eight bits are enough, nothing wider is
used: a CPU's vector registers then hold four times as many pixels, and comparisons, which torch does not vectorise for
bytes, are avoided.
"""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import magnitudes
from mpl_scale.augment.registry import Given, bands, per_image, register_op

_SHIFT = 12
_ONE = 1 << _SHIFT


def _weights(factor: np.ndarray, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and 1 - f in multiples of 1/4096, each int32 [B, 1, 1, 1]."""
    steps = np.round(factor * _ONE)
    return per_image(steps, images), per_image(_ONE - steps, images)


def _blend(
    degenerate: torch.Tensor | None, wide: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """d + f (x - d), truncated and clipped to 0..255, in place of x.

    Args:
        degenerate: int32 [B, 1 or 3, h or 1, w or 1], overwritten; None: black.
        wide: int32 [B, 3, h, w].
        weights: of x and d.
    """
    wide.mul_(weights[0])
    if degenerate is not None:
        wide.add_(degenerate.mul_(weights[1]))
    return wide.bitwise_right_shift_(_SHIFT).clamp_(0, 255)


def _luminance(wide: torch.Tensor) -> torch.Tensor:
    """PIL's mode "L" (ITU-R 601-2 in 16-bit fixed point): int32 [B, 3, h, w] to [B, 1, h, w]."""
    red, green, blue = wide.split(1, dim=1)
    grey = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return grey.add_(0x8000).bitwise_right_shift_(16)


@register_op("brightness", amount=magnitudes.factor)
def brightness(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Brightness(factor): blend with black."""
    weights, result = _weights(amount, images), torch.empty_like(images)
    for band in bands(images):
        result[:, :, band] = _blend(None, images[:, :, band].int(), weights)
    return result


@register_op("color", amount=magnitudes.factor)
def color(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Color(factor): blend with the grey image."""
    weights, result = _weights(amount, images), torch.empty_like(images)
    for band in bands(images):
        wide = images[:, :, band].int()
        result[:, :, band] = _blend(_luminance(wide), wide, weights)
    return result


@register_op("contrast", amount=magnitudes.factor)
def contrast(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Contrast(factor): blend with the rounded mean luminance."""
    weights, result = _weights(amount, images), torch.empty_like(images)
    parts = [_luminance(images[:, :, band].int()).to(torch.uint8).sum((1, 2, 3)) for band in bands(images)]
    total = torch.stack(parts).sum(0)
    pixels = images.shape[2] * images.shape[3]
    mean = ((2 * total + pixels) // (2 * pixels)).int().view(-1, 1, 1, 1)
    for band in bands(images):
        result[:, :, band] = _blend(mean.clone(), images[:, :, band].int(), weights)
    return result


@register_op("sharpness", amount=magnitudes.factor)
def sharpness(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageEnhance.Sharpness(factor): blend with ImageFilter.SMOOTH, which keeps the border pixels."""
    weights, result = _weights(amount, images), images.clone()
    if min(images.shape[2:]) <= 2:
        return result
    inner = result[:, :, 1:-1, 1:-1]
    for band in bands(inner):
        wide = images[:, :, band.start : band.stop + 2].short()
        rows = wide[:, :, :-2] + wide[:, :, 1:-1]
        rows.add_(wide[:, :, 2:])
        total = rows[..., :-2] + rows[..., 1:-1]
        total.add_(rows[..., 2:]).add_(wide[:, :, 1:-1, 1:-1], alpha=4)
        # The kernel sums to 13; (2 total + 13) // 26 rounds to nearest, never a tie. 161320 / 2**22 is 1 / 26 closely
        # enough for every total, which is at most 13 * 255.
        smooth = total.int().mul_(2 * 161320).add_(13 * 161320).bitwise_right_shift_(22)
        inner[:, :, band] = _blend(smooth, wide[:, :, 1:-1, 1:-1].int(), weights)
    return result


@register_op("posterize", amount=magnitudes.bits)
def posterize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.posterize(bits): the low bits are set to 0."""
    return images & per_image(256 - 2.0 ** (8 - amount), images, dtype=np.uint8)


@register_op("solarize", amount=magnitudes.threshold)
def solarize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.solarize(threshold): pixels from it on are inverted."""
    base = per_image(np.maximum(amount - 1, 0), images, dtype=np.uint8)
    floor = per_image(np.where(amount == 0, 1, amount - 1), images, dtype=np.uint8)  # threshold 0 inverts everything
    excess = torch.maximum(images, floor).sub_(base)  # 0 below the threshold, else at least 1
    return excess.clamp_(max=1).neg_().bitwise_xor_(images)  # -1 is 255: x ^ 255 = 255 - x


@register_op("invert")
def invert(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.invert."""
    return ~images


@register_op("sample_pairing", amount=magnitudes.share, pairs=True)
def sample_pairing(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """Image.blend(image, partner, share) (Inoue 2018); the label stays the image's."""
    assert given.partners is not None
    weights, result = _weights(amount, images), torch.empty_like(images)
    for band in bands(images):
        result[:, :, band] = _blend(images[:, :, band].int(), given.partners[:, :, band].int(), weights)
    return result
