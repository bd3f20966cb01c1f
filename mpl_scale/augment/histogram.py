"""Operations that depend on an image's values, channel by channel, through one table of 256 entries for each."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import large
from mpl_scale.augment.lookup import LEVELS, look_up
from mpl_scale.augment.parameters import Values
from mpl_scale.augment.registry import Given, register_op


def histograms(images: torch.Tensor) -> torch.Tensor:
    """Pixels of each value, int64 [B, 3, 256]."""
    if images.device.type != "cpu":
        return count_levels(images.flatten(2).long())
    # bincount reads bytes faster than the widened copy of all of them is made
    counts = [torch.bincount(channel, minlength=LEVELS) for channel in images.flatten(2).flatten(0, 1)]
    return torch.stack(counts).view(*images.shape[:2], LEVELS)


def count_levels(index: torch.Tensor) -> torch.Tensor:
    """How often each level occurs in int64 [B, 3, N]: int64 [B, 3, 256]. On CUDA bincount would wait for the device."""
    ones = index.new_ones(()).expand(index.shape)
    return index.new_zeros(*index.shape[:2], LEVELS).scatter_add_(2, index, ones)


def stretched_tables(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """What autocontrast makes of each level, uint8 [B, 3, 256]; low, high: uint8 [B, 3, 1], a channel's extremes.

    PIL computes int(x * (255 / (high - low)) - low * (255 / (high - low))) in double precision; so does this, in the
    same order, because the integer quotient differs from it by one level where the double falls just below an integer.
    """
    low, high = low.double(), high.double()
    scale = torch.full_like(high, 255) / (high - low).clamp_(min=1)  # 255 / tensor would multiply by a reciprocal
    level = torch.arange(LEVELS, device=low.device, dtype=torch.float64)
    stretched = torch.where(high > low, level * scale - low * scale, level)
    return stretched.clamp_(0, 255).to(torch.uint8)


def equalized_tables(counts: torch.Tensor, high: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """What equalize makes of each level, uint8 [B, 3, 256].

    Args:
        counts: int64 [B, 3, 256], pixels of each value.
        high: uint8 [B, 3, 1], the largest value of each channel.
        images: [B, 3, H, W].
    """
    brightest = counts.gather(2, high.long())
    step = (images.shape[2] * images.shape[3] - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, torch.arange(LEVELS, device=counts.device)).to(torch.uint8)


def _stretch(amount: np.ndarray, places: np.ndarray, size: tuple[int, int]) -> Values:
    return {"stretch": 1}


def _equalize(amount: np.ndarray, places: np.ndarray, size: tuple[int, int]) -> Values:
    return {"equalize": 1}


@register_op("autocontrast", of_one=large.autocontrast, static=_stretch)
def autocontrast(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.autocontrast with cutoff 0: stretch each channel to 0..255."""
    flat = images.flatten(2)  # torch.aminmax takes 5 to 20 times as long on a CPU
    return look_up(images, stretched_tables(flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)))


@register_op("equalize", of_one=large.equalize, static=_equalize)
def equalize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.equalize: the lookup table is the running count over (pixels below the maximum) // 255.

    Channels with fewer than 255 pixels below their maximum are left alone, as in PIL: 8x8 images never change.
    """
    if images.shape[2] * images.shape[3] <= 255:
        return images.clone()
    high = images.flatten(2).amax(2, keepdim=True)
    return look_up(images, equalized_tables(histograms(images), high, images))
