"""Source `synthetic`: random images of the size that a configuration's views are cut from, made when they are read.

It tries a machine with any configuration before its data is there. A class can be learned: it is a pattern of 4 x 4
colours, under noise of each image's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpl_scale.config import Config
from mpl_scale.data.encoded.probe import ppm

PARTS = 4
"""Test, held out, labelled, unlabelled: each of `count` images, one behind another."""
_CELLS = 4
_OF_CLASSES = 1 << 63  # where the keys of patterns begin, beyond all sample ids


@dataclass(frozen=True)
class SyntheticImages:
    """An ImageSet: pixels are a function of (seed, sample id), on every machine.

    count: of each part. side: pixels. number: of classes.
    """

    count: int
    side: int
    number: int
    seed: int

    bad = 0

    @classmethod
    def of(cls, config: Config) -> SyntheticImages:
        """The images of a run: of `data.synthetic_images`, its classes, and the size that it is evaluated at."""
        data, side = config.data, config.model.image_size
        if data.evaluation.kind == "center_crop":
            side = math.ceil(side / data.evaluation.crop_pct)
        seed = config.seed if data.split_seed is None else data.split_seed
        return cls(data.synthetic_images, side, config.model.num_classes, seed)

    def __len__(self) -> int:
        return PARTS * self.count

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: the classes in turn."""
        return np.arange(len(self), dtype=np.int64) % self.count % self.number

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], pixels."""
        return np.full((len(self), 2), self.side, np.int32)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Numbered."""
        return tuple(f"class {number}" for number in range(self.number))

    @property
    def refused(self) -> np.ndarray:
        """No sample id, int64 [0]."""
        return np.zeros(0, np.int64)

    def read(self, sample: int) -> np.ndarray:
        """A PPM file, uint8."""
        pattern = self._random(_OF_CLASSES + int(self.labels[sample]), 3 * _CELLS**2).reshape(_CELLS, _CELLS, 3)
        cell = np.arange(self.side) * _CELLS // self.side
        noise = self._random(sample, 3 * self.side**2).reshape(self.side, self.side, 3)
        pixels = (pattern // 4 * 3)[cell][:, cell] + noise // 4
        return np.frombuffer(ppm(pixels.tobytes(), height=self.side, width=self.side), np.uint8)

    def name(self, sample: int) -> str:
        """The source and the sample id."""
        return f"synthetic:{sample}"

    def refusals(self, most: int) -> Mapping[str, str]:
        """Nothing is refused."""
        return {}

    def _random(self, key: int, count: int) -> np.ndarray:
        """uint8 [count]; numpy keeps the raw numbers of its Philox the same in all versions."""
        raw = np.random.Philox(key=np.array([self.seed % (1 << 64), key], np.uint64)).random_raw(-(-count // 8))
        return raw.astype("<u8").view(np.uint8)[:count]
