"""Real photographs that installed packages ship, resized and encoded anew; and image sets held in memory."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image

from mpl_scale.data.encoded.header import UnreadableImage

_FOLDERS = (
    Path(sklearn.datasets.__file__).parent / "images",
    Path(matplotlib.__file__).parent / "mpl-data" / "sample_data",
)
NAMES = ("china.jpg", "flower.jpg", "grace_hopper.jpg")


@functools.cache
def photograph(index: int, width: int, height: int) -> Image.Image:
    """One of the photographs, RGB, without metadata."""
    name = NAMES[index % len(NAMES)]
    path = next(folder / name for folder in _FOLDERS if (folder / name).exists())
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(image))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class ImagesInMemory:
    """An ImageSet of encoded images, or of errors that reading them raises; labels are the ids."""

    def __init__(self, files: Sequence[bytes | UnreadableImage]) -> None:
        self.files = list(files)
        self.labels = np.arange(len(files))
        self.classes = tuple(map(str, self.labels))
        self.refused = np.zeros(0, np.int64)
        self.sizes = np.zeros((len(files), 2), np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, sample: int) -> np.ndarray:
        file = self.files[sample]
        if isinstance(file, UnreadableImage):
            raise file
        return np.frombuffer(file, np.uint8)

    def name(self, sample: int) -> str:
        return f"image {sample}"
