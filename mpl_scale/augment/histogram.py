"""Operations that depend on an image's histogram, channel by channel; they have no magnitude."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment.registry import register_op


@register_op("autocontrast")
def autocontrast(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageOps.autocontrast with cutoff 0: stretch each channel to 0..255.

    PIL computes int(x * (255 / (high - low)) - low * (255 / (high - low))) in double precision; so does this, in the
    same order, because the integer quotient differs from it by one level where the double falls just below an integer.
    """
    flat = images.flatten(2)
    low, high = (extreme.view(*images.shape[:2], 1, 1).double() for extreme in flat.aminmax(dim=2))
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)  # 255 / tensor would multiply by a reciprocal
    stretched = (images * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


@register_op("equalize")
def equalize(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
    """ImageOps.equalize: the lookup table is the running count over (pixels below the maximum) // 255.

    Channels with fewer than 255 pixels below their maximum are left alone, as in PIL: 8x8 images never change.
    """
    batch, channels, height, width = images.shape
    if height * width <= 255:
        return images
    offsets = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * 256
    index = images.flatten(2) + offsets
    counts = torch.bincount(index.flatten(), minlength=batch * channels * 256).view(batch, channels, 256)
    brightest = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (height * width - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    equalized = table.flatten()[index].view_as(images)
    return torch.where((step > 0)[..., None], equalized, images)
