"""Large images on a CPU: operations that Pillow itself does faster than torch does, where it is installed.

Pillow goes over an image once, with all channels of a pixel in one word. The same as torch operators is ten passes over
wider numbers, or a look-up of each pixel for each channel. The bytes are the same, so what is installed changes the
time only. Making a picture of planes and planes of a picture is a part of the cost: operations that torch does as fast
are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST = 1 << 15
"""Numbers of an image, 3 H W, from which one image at a time and Pillow are cheaper than a batch."""


def rotate(image: Image, degrees: float, fill: int) -> Image:
    from PIL.Image import Resampling

    return image.rotate(degrees, Resampling.NEAREST, fillcolor=(fill,) * 3)


def shear_y(image: Image, amount: float, fill: int) -> Image:
    from PIL.Image import Resampling, Transform

    data = (1, 0, 0, amount, 1, 0)
    return image.transform(image.size, Transform.AFFINE, data, Resampling.NEAREST, fillcolor=(fill,) * 3)


def color(image: Image, factor: float, fill: int) -> Image:
    from PIL.ImageEnhance import Color

    return Color(image).enhance(_rounded(factor))


def contrast(image: Image, factor: float, fill: int) -> Image:
    from PIL.ImageEnhance import Contrast

    return Contrast(image).enhance(_rounded(factor))


def equalize(image: Image, amount: float, fill: int) -> Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


_PICTURES: dict[str, Callable[[Image, float, int], Image]] = {
    function.__name__: function for function in (rotate, shear_y, color, contrast, equalize)
}


def by_picture(name: str, images: torch.Tensor) -> bool:
    """Whether `apply` is the way to do an operation, to uint8 [B, 3, H, W]."""
    if name not in _PICTURES or images.device.type != "cpu" or images.shape[1:].numel() < SMALLEST:
        return False
    return _installed()


def apply(name: str, images: torch.Tensor, amount: np.ndarray, *, fill: int) -> torch.Tensor:
    """The operation of that name on each image; amount: float64 [B], in the units of PIL's function."""
    from PIL import Image

    size = (images.shape[3], images.shape[2])
    result = torch.empty_like(images)
    for planes, out, value in zip(images.numpy(), result.flatten(2).numpy(), amount.tolist(), strict=True):
        bands = [Image.frombuffer("L", size, plane, "raw", "L", 0, 1) for plane in planes]
        picture = _PICTURES[name](Image.merge("RGB", bands), value, fill)
        for channel, plane in zip("RGB", out, strict=True):
            plane[:] = np.frombuffer(picture.tobytes("raw", channel), np.uint8)
    return result


@cache
def _installed() -> bool:
    return find_spec("PIL") is not None


def _rounded(factor: float) -> float:
    """The nearest multiple of 1/4096, as in colour.py."""
    return round(factor * 4096) / 4096
