"""What unlabelled images really show, where their source says it: for people who watch a run, never for training.

No batch carries it. It is looked up by sample id, beside the loader, and compared with pseudo labels after a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.joined import JoinedImages, class_places
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.samples.whole_training_set import FOLDER

UNKNOWN = -1


class Truth:
    """The classes of a split's unlabelled images, which training does not read.

    Unknown are those of parts without labels, of a set whose classes are not the run's, and of a selection, whose
    labels are a network's. So are images that are among the labelled ones too: training does read their labels.
    """

    def __init__(self, splits: Splits) -> None:
        images = splits.images
        sets = images.sets if isinstance(images, JoinedImages) else (images,)
        self._labels, self._labelled = images.labels, splits.labelled
        self._starts = np.cumsum([0, *map(len, sets)])  # int64 [sets + 1]
        self._sets = [_Known(one, images.classes) for one in sets]
        first, last = (self._numbers(splits.unlabelled[[place]])[0] for place in (0, -1))
        self.any = any(known.any for known in self._sets[first : last + 1])

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The class of each unlabelled image, or UNKNOWN: int64 [n]; ids: int64 [n]."""
        labels, numbers = np.asarray(self._labels[ids], np.int64), self._numbers(ids)
        for number, known in enumerate(self._sets):
            own = numbers == number
            if own.any():
                labels[own] = known(ids[own] - self._starts[number], labels[own])
        nearest = np.minimum(np.searchsorted(self._labelled, ids), len(self._labelled) - 1)
        return np.where(self._labelled[nearest] == ids, UNKNOWN, labels)

    def _numbers(self, ids: np.ndarray) -> np.ndarray:
        """The set of each sample, int64 [n]."""
        return np.searchsorted(self._starts, ids, "right") - 1


class _Known:
    """Which labels of one set are true, and which class of the run each is."""

    def __init__(self, images: ImageSet, classes: Sequence[str]) -> None:
        self._images = images if isinstance(images, IndexedImages) else None
        selected = self._images is not None and "selected_from_index" in self._images.meta
        self._places = None if selected else _places(images.classes, classes)  # int64 [classes of the set]
        shards = () if self._images is None else self._images.shards
        self._shards = np.array([_has_labels(shard.part, shard.name) for shard in shards])
        self.any = self._places is not None and (self._images is None or bool(self._shards.any()))

    def __call__(self, samples: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The run's classes, or UNKNOWN, of samples of this set, whose labels are given: int64 [n] each."""
        if self._places is None:
            return np.full(len(samples), UNKNOWN)
        found = self._places[labels]
        if self._images is None:
            return found
        return np.where(self._shards[self._images.shards_of(samples)], found, UNKNOWN)


def _places(found: Sequence[str], known: Sequence[str]) -> np.ndarray | None:
    """The class of the run that each class of a set is; None: they are others."""
    if list(found) == list(known):
        return np.arange(len(known))
    try:
        return class_places(found, known, name="unlabelled")
    except ValueError:
        return None


def _has_labels(part: str, name: str) -> bool:
    """Whether the labels of a shard are read from it and are of the data set's classes."""
    return part != "unlabelled" and FOLDER not in PurePosixPath(name).parts[:-1]
