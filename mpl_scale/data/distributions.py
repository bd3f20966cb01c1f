"""What a trained teacher once said of every image: a .npy of [N, K] probabilities, a row for each sample id.

Reduced MPL's teacher learns from it, and Noisy Student's labels can be taken from it, so that the large teacher is not
in memory (appendix E).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpl_scale.data.formats.arrays import read_npy
from mpl_scale.data.index.format import MalformedShard
from mpl_scale.data.samples.manifest import content, describe_splits
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.transfer import to_device
from mpl_scale.files import expanded, read_object

_CHUNK = 1 << 14  # rows judged at once
_TOLERANCE = 0.02  # of a sum: 1,000 float16 numbers, each rounded to 11 bits


def account_of(path: Path) -> Path:
    """Where `mpl-scale distributions` says which file it wrote, and of which images."""
    return path.with_name(f"{path.name}.json")


def describe_images(splits: Splits) -> dict[str, Any]:
    """What tells the images and their order, whatever the split."""
    found = content(describe_splits(splits))
    return {name: value for name, value in found.items() if not name.startswith("splits.")}


def check_distributions(path: Path, splits: Splits) -> str:
    """Read all of a file and return its SHA-256.

    Raises:
        ValueError: a row is no distribution, the file is not the one that its account is of, or it is of other images
            or of another order. A file without an account is believed to be of these images.
    """
    where = f"mpl_scale.data.distributions = '{path}'"
    images = splits.images
    stored = Distributions(str(path), images=len(images), classes=len(images.classes), device=torch.device("cpu"))
    values = stored.values
    for start in range(0, len(values), _CHUNK):
        rows = np.asarray(values[start : start + _CHUNK], np.float32)
        good = (rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) <= _TOLERANCE)  # a NaN is neither
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            raise ValueError(
                f"{where}: row {row} is no distribution (least {rows[row - start].min():g}, sum "
                f"{rows[row - start].sum():g}); write it again with mpl-scale distributions"
            )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    account = account_of(path)
    if account.exists():
        known = read_object(account, fix="write both again with mpl-scale distributions")
        if known.get("sha256") != digest:
            raise ValueError(
                f"{where} is not the file that {account.name} beside it is of; write both again with mpl-scale "
                "distributions"
            )
        ours = describe_images(splits)
        other = [name for name, value in ours.items() if known.get("images", {}).get(name) != value]
        if other:
            raise ValueError(
                f"{where} is of other images, or of another order ({other[0]}); make it with this config's data section"
            )
    return digest


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
            self.values, _ = read_npy(expanded(path))
        except MalformedShard as error:
            raise ValueError(
                f"mpl_scale.data.distributions = '{path}': {error}; see mpl-scale distributions"
            ) from error
        if self.values.shape != (images, classes) or self.values.dtype.kind != "f":
            raise ValueError(
                f"mpl_scale.data.distributions = '{path}' holds {self.values.dtype} {list(self.values.shape)}, and "
                f"the data set has {images} images of {classes} classes; make it with this config's data section"
            )
        self._device = device

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        """float32 [n, K] of some sample ids."""
        return to_device(np.asarray(self.values[ids], np.float32), self._device)


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
