"""uint8 pixels to network inputs, on the device."""

from __future__ import annotations

import torch

from mpl_scale.config.schema import DataConfig


class Normalise:
    """(x / 255 - mean) / std per channel, in at least float32, then cast."""

    def __init__(
        self, config: DataConfig, *, device: torch.device, dtype: torch.dtype, channels_last: bool = False
    ) -> None:
        """Args:
        config: `mean` and `std` are read.
        device: where the images are.
        dtype: floating type of the result.
        channels_last: memory layout of the result.
        """
        self._dtype = dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._compute = torch.float64 if dtype == torch.float64 else torch.float32
        mean = torch.tensor(config.mean, dtype=torch.float64).view(1, -1, 1, 1)
        std = torch.tensor(config.std, dtype=torch.float64).view(1, -1, 1, 1)
        self._channels = len(config.mean)
        self._shift = (255 * mean).to(device, self._compute)
        self._scale = (1 / (255 * std)).to(device, self._compute)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3 or C, H, W] of any layout to `dtype` [n, C, H, W]. C is 1 where all 3 are one grey value."""
        pixels = images[:, : self._channels].to(self._compute, memory_format=self._layout)
        return pixels.sub_(self._shift).mul_(self._scale).to(self._dtype)
