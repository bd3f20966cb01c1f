"""Several right labels of an image, as ImageNet-ReaL has them (Beyer et al. 2020, "Are we done with ImageNet?").

Tables 1 and 4 of the paper report it. The file is JSON: a list of lists of classes, one for each image by the order of
file names, as ImageNet-ReaL's `real.json` is for ILSVRC2012_val_00000001.JPEG and on; or an object with such a list by
file name. An image with an empty list has no right label and is left out of the accuracy.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mpl_scale.data import ImageFiles
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.inference.labelled import LabelledImages

OPTION = "--real_labels"


@dataclass(frozen=True)
class RealLabels:
    """The right labels of n images.

    pairs: int64, sample * classes + class, of every right label. labelled: bool [n], images with a label.
    """

    pairs: np.ndarray
    labelled: np.ndarray
    classes: int

    def right(self, ids: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Whether each image's class is one of its labels, bool [m]. ids, predicted: int64 [m]."""
        return np.isin(ids * self.classes + predicted, self.pairs)


def read_real_labels(path: Path, images: LabelledImages) -> RealLabels:
    """The labels of all images, as the network counts its classes.

    Raises:
        ValueError: not such a file, another number of images or other names, a class out of range, no label at all, or
            images without file names of their own.
    """
    try:
        found: Any = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{OPTION} {path}: cannot be read as JSON: {error}") from error
    names = _names(images)
    if isinstance(found, list):
        if len(found) != len(names):
            raise ValueError(f"{OPTION} {path}: {len(found):,} entries for {len(names):,} images; give one for each")
        found = dict(zip(sorted(names), found, strict=True))
    if not isinstance(found, dict):
        raise ValueError(f"{OPTION} {path}: neither a list of lists of classes nor an object with a list by file name")
    if found.keys() != set(names):
        other = sorted(found.keys() ^ set(names))
        raise ValueError(
            f"{OPTION} {path}: {len(other):,} names are only in it or only among the images, '{other[0]}' first; "
            "give an entry for each image's file name, without its folder"
        )
    count, classes = len(images.places), len(images.classes)
    for name, labels in found.items():
        if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < count for label in labels):
            raise ValueError(f"{OPTION} {path}: '{name}' has {labels!r}; give a list of classes from 0 to {count - 1}")
    own = [found[name] for name in names]
    lengths = np.array([len(labels) for labels in own], np.int64)
    if not lengths.any():
        raise ValueError(f"{OPTION} {path}: no image has a label")
    flat = np.array([label for labels in own for label in labels], np.int64)
    return RealLabels(np.repeat(np.arange(len(own)), lengths) * classes + images.places[flat], lengths > 0, classes)


def _names(images: LabelledImages) -> list[str]:
    """File names without folders."""
    source = images.images
    if not (isinstance(source, ImageFiles) or (isinstance(source, IndexedImages) and source.of_files)):
        raise ValueError(
            f"{OPTION}: the images are not files of their own, and have no names to match; give --data with a folder "
            "for each class"
        )
    names = [PurePath(images.name(sample)).name for sample in range(len(images))]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{OPTION}: {times} images are called '{name}'; their names must differ")
    return names
