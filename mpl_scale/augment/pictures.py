"""Large images on a CPU: operations that Pillow itself does faster than torch does, where it is installed.

Pillow goes over an image once, with all channels of a pixel in one word. The same as torch operators is ten passes over
wider numbers, or a look-up of each pixel for each channel. The bytes are the same, so what is installed changes the
time only. Making a picture of planes and planes of a picture is a part of the cost: a picture is made for operations
that gain more than that, and once there is one, the next operations take it as it is.
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


def are_large(images: torch.Tensor) -> bool:
    """Whether images, uint8 [B, 3, H, W], are best augmented one at a time, each as a Canvas."""
    return images.device.type == "cpu" and images.shape[1:].numel() >= SMALLEST


class Canvas:
    """One large image on a CPU: planes or a picture, whichever the last operation made of it.

    The planes are numpy's: next to Pillow's work, slicing a tensor and asking for its numbers would show.
    """

    def __init__(self, planes: np.ndarray) -> None:
        """planes: uint8 [3, H, W]; not written to."""
        self._planes = np.ascontiguousarray(planes)
        self._picture: Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self._planes.shape[1], self._planes.shape[2]

    def takes(self, name: str) -> bool:
        """Whether `draw` is the way to do the operation of that name."""
        return name in _PICTURES and (self._picture is not None or name in _WORTH_A_PICTURE) and _installed()

    def draw(self, name: str, amount: float, *, fill: int) -> None:
        """Do an operation that it takes; amount: in the units of PIL's function."""
        self._picture = _PICTURES[name](self._as_picture(), amount, fill)

    def replace(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Do an operation to the planes, uint8 [1, 3, H, W]; the result is contiguous."""
        self._planes = operation(torch.from_numpy(self.planes()[None]))[0].numpy()

    def planes(self) -> np.ndarray:
        """uint8 [3, H, W], contiguous."""
        if self._picture is not None:
            planes = np.empty_like(self._planes)
            self.store(planes)
            self._planes, self._picture = planes, None
        return self._planes

    def store(self, out: np.ndarray) -> None:
        """Write it to uint8 [3, H, W], contiguous."""
        if self._picture is None:
            out[...] = self._planes
            return
        for channel, plane in zip("RGB", out.reshape(3, -1), strict=True):
            plane[:] = np.frombuffer(self._picture.tobytes("raw", channel), np.uint8)

    def _as_picture(self) -> Image:
        from PIL import Image

        if self._picture is not None:
            return self._picture
        size = self.size[::-1]
        return Image.merge("RGB", [Image.frombuffer("L", size, plane, "raw", "L", 0, 1) for plane in self._planes])


def _transformed(image: Image, data: tuple[float, ...], fill: int) -> Image:
    from PIL.Image import Resampling, Transform

    return image.transform(image.size, Transform.AFFINE, data, Resampling.NEAREST, fillcolor=(fill,) * 3)


def rotate(image: Image, degrees: float, fill: int) -> Image:
    from PIL.Image import Resampling

    return image.rotate(degrees, Resampling.NEAREST, fillcolor=(fill,) * 3)


def shear_x(image: Image, amount: float, fill: int) -> Image:
    return _transformed(image, (1, amount, 0, 0, 1, 0), fill)


def shear_y(image: Image, amount: float, fill: int) -> Image:
    return _transformed(image, (1, 0, 0, amount, 1, 0), fill)


def translate_x(image: Image, pixels: float, fill: int) -> Image:
    return _transformed(image, (1, 0, pixels, 0, 1, 0), fill)


def translate_y(image: Image, pixels: float, fill: int) -> Image:
    return _transformed(image, (1, 0, 0, 0, 1, pixels), fill)


def color(image: Image, factor: float, fill: int) -> Image:
    from PIL.ImageEnhance import Color

    return Color(image).enhance(_rounded(factor))


def brightness(image: Image, factor: float, fill: int) -> Image:
    return _blended(image, 0, factor)


def contrast(image: Image, factor: float, fill: int) -> Image:
    counts = image.convert("L").histogram()
    total = sum(level * count for level, count in enumerate(counts))
    return _blended(image, int(total / sum(counts) + 0.5), factor)


def autocontrast(image: Image, amount: float, fill: int) -> Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def equalize(image: Image, amount: float, fill: int) -> Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def solarize(image: Image, threshold: float, fill: int) -> Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, int(threshold))


_PICTURES: dict[str, Callable[[Image, float, int], Image]] = {
    function.__name__: function
    for function in (
        *(rotate, shear_x, shear_y, translate_x, translate_y),
        *(color, brightness, contrast, autocontrast, equalize, solarize),
    )
}
_WORTH_A_PICTURE = {"rotate", "shear_y", "color", "contrast", "equalize"}


def _blended(image: Image, level: int, factor: float) -> Image:
    """level + f (x - level), truncated and clipped: as a table, which PIL's enhancers make an image of instead."""
    rounded = _rounded(factor)
    table = np.clip(rounded * np.arange(256) + (1 - rounded) * level, 0, 255).astype(int).tolist()
    return image.point(table * 3)


@cache
def _installed() -> bool:
    return find_spec("PIL") is not None


def _rounded(factor: float) -> float:
    """The nearest multiple of 1/4096, as in colour.py."""
    return round(factor * 4096) / 4096
