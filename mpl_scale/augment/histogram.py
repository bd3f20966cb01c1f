"""Operations that depend on an image's values, channel by channel, through one table of 256 entries for each."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment import large
from mpl_scale.augment.lookup import LEVELS, look_up
from mpl_scale.augment.registry import Given, register_op


def histograms(images: torch.Tensor) -> torch.Tensor:
    """Pixels of each value, int64 [B, 3, 256]."""
    batch, channels = images.shape[:2]
    if images.device.type == "cpu":  # bincount reads bytes faster than the widened copy of all of them is made
        counts = [torch.bincount(channel, minlength=LEVELS) for channel in images.view(batch * channels, -1)]
        return torch.stack(counts).view(batch, channels, LEVELS)
    starts = torch.arange(0, batch * channels * LEVELS, LEVELS, device=images.device, dtype=torch.int32)
    index = (images.int() + starts.view(batch, channels, 1, 1)).flatten()
    return torch.bincount(index, minlength=batch * channels * LEVELS).view(batch, channels, LEVELS)


@register_op("autocontrast", of_one=large.autocontrast)
def autocontrast(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.autocontrast with cutoff 0: stretch each channel to 0..255.

    PIL computes int(x * (255 / (high - low)) - low * (255 / (high - low))) in double precision; so does this, in the
    same order, because the integer quotient differs from it by one level where the double falls just below an integer.
    """
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    scale = torch.full_like(high, 255) / (high - low).clamp_(min=1)  # 255 / tensor would multiply by a reciprocal
    level = torch.arange(LEVELS, device=images.device, dtype=torch.float64)
    stretched = torch.where(high > low, level * scale - low * scale, level)
    return look_up(images, stretched.clamp_(0, 255).to(torch.uint8))


@register_op("equalize", of_one=large.equalize)
def equalize(images: torch.Tensor, amount: np.ndarray, given: Given) -> torch.Tensor:
    """ImageOps.equalize: the lookup table is the running count over (pixels below the maximum) // 255.

    Channels with fewer than 255 pixels below their maximum are left alone, as in PIL: 8x8 images never change.
    """
    pixels = images.shape[2] * images.shape[3]
    if pixels <= 255:
        return images.clone()
    counts = histograms(images)
    brightest = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (pixels - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(LEVELS, device=images.device))
    return look_up(images, table.to(torch.uint8))
