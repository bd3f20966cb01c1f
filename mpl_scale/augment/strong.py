"""The strong view x_s of a weak view x_u: RandAugment (Cubuk et al. 2020), then cutout (DeVries and Taylor 2017)."""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.augment.registry import find_ops, per_image
from mpl_scale.config.schema import StrongConfig
from mpl_scale.philox import uniform_numpy

MAX_MAGNITUDE = 10
STREAM_LIMIT = 1 << 24
_STREAM_BASE = 0xFF << 24  # apart from the streams of mpl_scale.data and of the networks
_DRAWS_PER_OP = 4  # operation, magnitude, sign, applied


class StrongView:
    """Callable on a batch; an image's result depends on its pixels, id, epoch and the seed alone.

    So it does not depend on the other images of the batch, nor on how the batch is divided over ranks.
    """

    def __init__(self, config: StrongConfig, *, seed: int, stream: int) -> None:
        """Args:
        config: operations, their number, magnitudes and the cutout.
        seed: the run's seed.
        stream: phases with different streams draw differently; in [0, 2**24).

        Raises:
            ValueError: an unknown operation, or a stream outside its range.
        """
        if not 0 <= stream < STREAM_LIMIT:
            raise ValueError(f"stream = {stream} is outside [0, {STREAM_LIMIT}); number the phases from 0")
        self._config = config
        self._ops = find_ops(config.ops)
        self._seed = seed
        self._stream = _STREAM_BASE | stream

    def __call__(self, images: torch.Tensor, ids: np.ndarray, epochs: np.ndarray) -> torch.Tensor:
        """The strong views.

        Args:
            images: uint8 [U, 3, H, W], the weak views.
            ids: int64 [U], sample ids.
            epochs: int64 [U], the epoch each sample is drawn in.

        Returns:
            uint8 [U, 3, H, W].
        """
        if not len(images):
            return images
        count = self._config.num_ops * _DRAWS_PER_OP
        uniform = uniform_numpy(seed=self._seed, stream=self._stream, epoch=epochs, ids=ids, columns=count + 2)
        for first in range(0, count, _DRAWS_PER_OP):
            images = self._apply_one(images, uniform[:, first : first + _DRAWS_PER_OP])
        if self._config.cutout:
            images = cutout(images, uniform[:, count:], side=self._config.cutout, fill=self._config.fill)
        return images

    def _apply_one(self, images: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
        """One operation per image, uniform [U, 4] deciding which; images are grouped by operation."""
        config = self._config
        which = (uniform[:, 0] * len(self._ops)).astype(np.int64)
        magnitude = config.magnitude * (uniform[:, 1] if config.random_magnitude else 1.0)
        strength = magnitude / MAX_MAGNITUDE * np.where(uniform[:, 2] < 0.5, -1.0, 1.0)
        which[uniform[:, 3] >= config.probability] = len(self._ops)  # left alone
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(which, minlength=len(self._ops)))[: len(self._ops)])
        indices = torch.from_numpy(order).to(images.device)
        parts = list(images[indices].split([len(group) for group in groups]))
        for position, operation in enumerate(self._ops):
            if len(groups[position]):
                parts[position] = operation(parts[position], strength[groups[position]], fill=config.fill)
        return torch.empty_like(images).index_copy_(0, indices, torch.cat(parts))


def cutout(images: torch.Tensor, uniform: np.ndarray, *, side: int, fill: int) -> torch.Tensor:
    """Fill a square centred on a uniformly drawn pixel; the part outside the image is lost.

    Args:
        images: uint8 [B, 3, H, W].
        uniform: float64 [B, 2] in (0, 1), the centre's row and column as shares of the height and width.
        side: pixels.
        fill: value inside the square.
    """
    height, width = images.shape[2:]
    top = per_image(np.floor(uniform[:, 0] * height) - side // 2, images)
    left = per_image(np.floor(uniform[:, 1] * width) - side // 2, images)
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    square = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)  # [B, 1, H, W]
    return images.masked_fill(square, fill)
