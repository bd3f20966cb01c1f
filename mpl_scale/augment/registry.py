"""Augmentation operations by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mpl_scale.config.names import Registry, require_known

Operation = Callable[..., torch.Tensor]
"""`(images, strength, *, fill) -> images`

images: uint8 [B, 3, H, W], and so is the result; each image is treated by itself.
strength: float64 [B] on the host in [-1, 1], magnitude / 10 with a random sign; operations without a direction read
    its absolute value, and 0 leaves an image as it is unless the operation has no magnitude.
fill: value of pixels that come from outside the image, 0 to 255.
"""
OPS: Registry[Operation] = Registry("augmentation")
register_op = OPS.register
"""Make an operation available in `mpl_scale.data.strong.ops`."""
TABLE_5 = (
    "autocontrast",
    "brightness",
    "color",
    "contrast",
    "equalize",
    "invert",
    "sharpness",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The paper's list for CIFAR-10 and ImageNet, without Sample Pairing: that one mixes in another image of the batch, so
its result would depend on how the batch is divided over ranks. For SVHN (and digits) the paper also leaves out rotate
and translate_x."""


def find_ops(names: Sequence[str]) -> list[Operation]:
    """The operations of `mpl_scale.data.strong.ops`; none named: those of Table 5.

    Raises:
        ValueError: an unknown name, with the closest one.
    """
    for name in names:
        require_known("mpl_scale.data.strong.ops", name, OPS)
    return [OPS[name] for name in names or TABLE_5]


def per_image(values: np.ndarray, images: torch.Tensor, *, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Host values [B] as a tensor [B, 1, 1, 1] on the images' device."""
    return torch.from_numpy(values).to(images.device, dtype).view(-1, 1, 1, 1)
