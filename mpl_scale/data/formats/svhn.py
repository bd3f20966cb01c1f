"""Source `svhn`: train_32x32.mat, extra_32x32.mat and test_32x32.mat, as the official site has them.

X is uint8 [32, 32, 3, N] and compressed, so its pixels are written out once, beside the index; y is [N, 1], and its
label 10 is the digit 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpl_scale.data.formats.matfile import MatArray, read_arrays
from mpl_scale.data.index.format import (
    BadLabel,
    Layout,
    MalformedShard,
    NoShards,
    Part,
    PlainFormat,
    Scan,
    ScanOptions,
    Shard,
    existing,
    register_format,
)

_PARTS: tuple[tuple[str, Part], ...] = (
    ("train_32x32.mat", "train"),
    ("extra_32x32.mat", "extra"),
    ("test_32x32.mat", "test"),
)
_CHUNK = 4096  # images unpacked at once
_LARGEST_IMAGE = 1 << 24  # bytes


@register_format("svhn")
class Svhn(PlainFormat):
    """SVHN's cropped digits ("format 2")."""

    layout: Layout = "rows"

    def shards(self, root: Path) -> Sequence[Shard]:
        found = existing(root, _PARTS)
        if not any(shard.part == "train" for shard in found):
            raise NoShards(f"mpl_scale.data.root = '{root}' holds no train_32x32.mat; name the folder of SVHN's files")
        return found

    def classes(self, root: Path) -> Sequence[str]:
        return tuple("0123456789")

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        try:
            with open(root / shard.name, "rb") as file, open(unpacked, "wb") as pixels:
                height, width, labels = _read(file, pixels)
        except MalformedShard as error:
            unpacked.unlink(missing_ok=True)
            return Scan.lost(shard, error)
        return Scan.of_pixels(labels, size=(height, width), length=3 * height * width)


def _read(file: BinaryIO, pixels: BinaryIO) -> tuple[int, int, np.ndarray]:
    """Height and width of the images, and labels int64 [images]; the pixels go to the other file."""
    shape, labels = None, None
    for array in read_arrays(file):
        if (array.name == "X" and shape is not None) or (array.name == "y" and labels is not None):
            raise BadLabel(f"two arrays {array.name}: which labels belong to which images is unknown")
        if array.name == "X":
            shape = _unpack(array, pixels)
        elif array.name == "y":
            labels = _labels(array)
    if shape is None or labels is None:
        raise MalformedShard("there is no array X, or none y")
    height, width, count = shape
    if count != len(labels):
        raise BadLabel(f"{count} images and {len(labels)} labels")
    return height, width, labels


def _unpack(array: MatArray, pixels: BinaryIO) -> tuple[int, int, int]:
    """[H, W, 3, N], the first dimension moving fastest, to N images [H, W, 3]; returns H, W, N."""
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[2] != 3 or 0 in array.shape:
        raise MalformedShard(f"X is {array.dtype} {list(array.shape)}, not uint8 [H, W, 3, N]")
    height, width, _, count = array.shape
    image = 3 * height * width
    if image > _LARGEST_IMAGE:
        raise MalformedShard(f"images of {height} x {width} pixels")
    most = max(1, min(_CHUNK, _LARGEST_IMAGE // image))
    for start in range(0, count, most):
        images = min(most, count - start)
        values = array.values.read(images * image).reshape(images, 3, width, height)
        pixels.write(values.transpose(0, 3, 2, 1).tobytes())
    return height, width, count


def _labels(array: MatArray) -> np.ndarray:
    count = max(array.shape)
    if len(array.shape) != 2 or min(array.shape) != 1 or count > 1 << 31:
        raise BadLabel(f"y has shape {list(array.shape)[:8]}, not [N, 1]")
    values = np.concatenate(
        [array.values.read(min(1 << 20, count - start)) for start in range(0, count, 1 << 20)] or [np.zeros(0)]
    )
    if not np.isin(values, np.arange(11)).all():
        raise BadLabel("y holds other labels than 1 to 10, or 0 to 9")
    if np.isin((0, 10), values).all():
        raise BadLabel("y holds both 0 and 10, and either is the digit 0; write 1 to 10, or 0 to 9")
    return values.astype(np.int64) % 10
