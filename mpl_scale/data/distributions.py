"""What a trained teacher once said of every image: a .npy of [N, K] probabilities, a row for each sample id.

Reduced MPL's teacher learns from it, and Noisy Student's labels can be taken from it, so that the large teacher is not
in memory (appendix E).
"""

from __future__ import annotations

import numpy as np
import torch

from mpl_scale.data.formats.arrays import read_npy
from mpl_scale.data.index.format import MalformedShard
from mpl_scale.data.transfer import to_device
from mpl_scale.files import expanded


class Distributions:
    """Rows of the file by sample id, as float32 tensors on a device. The file stays on disk, memory-mapped."""

    def __init__(self, path: str, *, images: int, classes: int, device: torch.device) -> None:
        """Args:
        path: of the .npy; floating point [images, classes].
        images: of the data set, unlabelled ones of another index included.
        classes: of the data set.
        device: of the tensors.

        Raises:
            ValueError: the file is missing, or of another shape.
        """
        try:
            self._values, _ = read_npy(expanded(path))
        except MalformedShard as error:
            raise ValueError(
                f"mpl_scale.data.distributions = '{path}': {error}; see mpl-scale distributions"
            ) from error
        if self._values.shape != (images, classes) or self._values.dtype.kind != "f":
            raise ValueError(
                f"mpl_scale.data.distributions = '{path}' holds {self._values.dtype} {list(self._values.shape)}, and "
                f"the data set has {images} images of {classes} classes; make it with this config's data section"
            )
        self._device = device

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [n, K] of some sample ids."""
        return to_device(np.asarray(self._values[ids], np.float32), self._device)


class SyntheticDistributions:
    """What a fairly good teacher would say of images that are made up: 0.9 for the label, the rest evenly."""

    def __init__(self, labels: np.ndarray, *, classes: int, device: torch.device) -> None:
        """Args:
        labels: int64 [N], by sample id.
        classes: how many.
        device: of the tensors.
        """
        self._labels, self._classes, self._device = labels, classes, device

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [n, K] of some sample ids."""
        rows = np.full((len(ids), self._classes), 0.1 / self._classes, np.float32)
        rows[np.arange(len(ids)), self._labels[ids]] += 0.9
        return to_device(rows, self._device)
