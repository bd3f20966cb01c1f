"""One large image on a CPU: the operations in numpy, and in Pillow where that is faster.

A call of torch's takes several microseconds here, an operation has up to twenty of them, and an image of 224 pixels is
done in fifty: so a large image is not a batch of one. The bytes are those of the batch operations in affine.py,
colour.py and histogram.py, whose docstrings give what is computed and why it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from mpl_scale.augment.lookup import LEVELS, translate_bytes

SMALLEST = 1 << 15
"""Numbers of an image, 3 H W, from which it is cheaper by itself than in a batch."""
_BAND = 5 << 15  # numbers whose copies as float32 still fit a second-level cache
_STEPS = 4096
_LUMA = tuple(np.float32(weight / 65536) for weight in (19595, 38470, 7471))
_LEVEL = np.arange(LEVELS)


OfOne = Callable[[np.ndarray, float, int], np.ndarray]
"""`(image, amount, fill) -> image`

image: uint8 [3, H, W], contiguous, not written to; and so is the result.
amount: in the units of PIL's function.
fill: value of pixels that come from outside the image.
"""


def are_large(images: torch.Tensor) -> bool:
    """Whether images, uint8 [B, 3, H, W], are best augmented one at a time, by the operations here."""
    return images.device.type == "cpu" and images.shape[1:].numel() >= SMALLEST


def rotate(image: np.ndarray, degrees: float, fill: int) -> np.ndarray:
    height, width = image.shape[1:]
    angle = -math.radians(degrees)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    shift_x = -cosine * width / 2 - sine * height / 2 + width / 2
    shift_y = sine * width / 2 - cosine * height / 2 + height / 2
    return _transformed(image, (cosine, sine, shift_x, -sine, cosine, shift_y), fill)


def shear_x(image: np.ndarray, amount: float, fill: int) -> np.ndarray:
    """Each row is a window of its row of a padded image."""
    channels, height, width = image.shape
    slope, offset = (math.floor(value * 65536 + 0.5) for value in (amount, 0.5 + 0.5 * amount))
    right = ((slope * np.arange(height) + offset) >> 16).clip(-width, width)
    ends = right[[0, -1]].tolist()
    before, after = max(0, -min(ends)), max(0, *ends)
    padded = np.full((channels, height, before + width + after), fill, np.uint8)
    padded[..., before : before + width] = image
    windows = np.ndarray((padded.size - width + 1, width), np.uint8, buffer=padded, strides=(1, 1))
    rows = np.arange(before, padded.size, padded.shape[2]).reshape(channels, height)
    return windows[rows + right]


def shear_y(image: np.ndarray, amount: float, fill: int) -> np.ndarray:
    return _transformed(image, (1, 0, 0, amount, 1, 0), fill)


def translate_x(image: np.ndarray, pixels: float, fill: int) -> np.ndarray:
    result, right, width = np.full_like(image, fill), int(pixels), image.shape[2]
    if abs(right) < width:
        result[..., max(-right, 0) : width - max(right, 0)] = image[..., max(right, 0) : width + min(right, 0)]
    return result


def translate_y(image: np.ndarray, pixels: float, fill: int) -> np.ndarray:
    result, down, height = np.full_like(image, fill), int(pixels), image.shape[1]
    if abs(down) < height:
        result[:, max(-down, 0) : height - max(down, 0)] = image[:, max(down, 0) : height + min(down, 0)]
    return result


def brightness(image: np.ndarray, factor: float, fill: int) -> np.ndarray:
    return _looked_up(image, [_rounded(factor) * _LEVEL])


def color(image: np.ndarray, factor: float, fill: int) -> np.ndarray:
    share, result = np.float32(_rounded(factor)), np.empty_like(image)
    for rows, wide in _bands(image):
        degenerate = _luminance(wide)
        degenerate *= 1 - share
        wide *= share
        wide += degenerate
        np.copyto(result[:, rows], np.clip(wide, 0, 255, out=wide), casting="unsafe")
    return result


def contrast(image: np.ndarray, factor: float, fill: int) -> np.ndarray:
    # Sums of a row are exact in float32, those of an image are not.
    total = sum(float(_luminance(wide).sum(1).sum(dtype=np.float64)) for _, wide in _bands(image))
    mean = math.floor(total / image[0].size + 0.5)
    return _looked_up(image, [_rounded(factor) * _LEVEL + (1 - _rounded(factor)) * mean])


def autocontrast(image: np.ndarray, amount: float, fill: int) -> np.ndarray:
    flat, tables = image.reshape(len(image), -1), []
    for low, high in zip(flat.min(1).tolist(), flat.max(1).tolist(), strict=True):
        scale = 255 / max(high - low, 1)
        tables.append(_LEVEL * scale - low * scale if high > low else _LEVEL)
    return _looked_up(image, tables)


def equalize(image: np.ndarray, amount: float, fill: int) -> np.ndarray:
    tables = []
    for channel in _channels(image):
        counts = np.array(channel.histogram())
        below = counts.cumsum() - counts
        step = int(below[np.flatnonzero(counts)[-1]]) // 255
        tables.append((below + step // 2) // step if step else _LEVEL)
    return _looked_up(image, tables)


def posterize(image: np.ndarray, bits: float, fill: int) -> np.ndarray:
    return image & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(image: np.ndarray, threshold: float, fill: int) -> np.ndarray:
    return image ^ np.negative((image >= int(threshold)).view(np.int8)).view(np.uint8)


def invert(image: np.ndarray, amount: float, fill: int) -> np.ndarray:
    return ~image


def _channels(image: np.ndarray) -> list[Image.Image]:
    size = image.shape[:0:-1]
    return [Image.frombuffer("L", size, channel, "raw", "L", 0, 1) for channel in image]


def _transformed(image: np.ndarray, data: Sequence[float], fill: int) -> np.ndarray:
    """Pillow goes over an image of three channels once, with all of a pixel in one word; else over each channel."""
    how = (image.shape[:0:-1], Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
    if len(image) != 3:
        return np.stack([np.asarray(channel.transform(*how, fillcolor=fill)) for channel in _channels(image)])
    picture = Image.merge("RGB", _channels(image)).transform(*how, fillcolor=(fill,) * 3)
    result = np.empty_like(image)
    for name, channel in zip("RGB", result.reshape(3, -1), strict=True):
        channel[:] = np.frombuffer(picture.tobytes("raw", name), np.uint8)
    return result


def _looked_up(image: np.ndarray, tables: Iterable[np.ndarray]) -> np.ndarray:
    """tables: 256 entries for each channel, or for all, to be truncated and clipped."""
    result = np.empty_like(image)
    entries = [table.clip(0, 255).astype(np.uint8).tobytes() for table in tables]
    for plane, table, out in zip(
        image.reshape(len(entries), -1), entries, result.reshape(len(entries), -1), strict=True
    ):
        translate_bytes(plane, table, out=out)
    return result


def _bands(image: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the image, and those as float32."""
    step = max(1, _BAND // image[:, 0].size)
    for first in range(0, image.shape[1], step):
        rows = slice(first, first + step)
        yield rows, image[:, rows].astype(np.float32)


def _luminance(wide: np.ndarray) -> np.ndarray:
    """Grey levels float32 [h, w] of an image float32 [3, h, w]."""
    grey, part = wide[0] * _LUMA[0], wide[1] * _LUMA[1]
    grey += part
    grey += np.multiply(wide[2], _LUMA[2], out=part)
    grey += np.float32(0.5)
    return np.floor(grey, out=grey)


def _rounded(factor: float) -> float:
    return round(factor * _STEPS) / _STEPS
