"""Test, labelled and unlabelled sample ids: a pure function of (seed, labels, settings)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpl_scale.config.schema import DataConfig
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.streams import Purpose, stream_of
from mpl_scale.philox import uniform_numpy


@dataclass(frozen=True)
class Splits:
    """Sample ids of each part, int64, sorted. `test` is disjoint from the others; `unlabelled` may hold `labelled`."""

    images: ImageSet
    test: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray


def make_splits(images: ImageSet, *, config: DataConfig, seed: int) -> Splits:
    """Hold out a stratified test share, then draw the labelled images of each class from the rest.

    Args:
        images: the data set.
        config: `test_fraction`, `labelled_per_class`, `unlabelled_from` and `split_seed` are read.
        seed: the run's seed, used when `split_seed` is null.

    Raises:
        ValueError: a class has too few images.
    """
    ids = np.arange(len(images), dtype=np.int64)
    keys = uniform_numpy(
        seed=seed if config.split_seed is None else config.split_seed,
        stream=stream_of(Purpose.SPLIT),
        epoch=np.zeros_like(ids),
        ids=ids,
        columns=1,
    )[:, 0]
    by_class = np.lexsort((ids, keys, images.labels))  # grouped by class, in random order within each
    counts = np.bincount(images.labels, minlength=len(images.classes))
    tests = np.maximum(1, np.round(config.test_fraction * counts).astype(np.int64))
    for name, count, test in zip(images.classes, counts, tests, strict=True):
        if count - test < config.labelled_per_class:
            raise ValueError(
                f"mpl_scale.data.labelled_per_class = {config.labelled_per_class}, but class {name!r} has {count} "
                f"images and test_fraction = {config.test_fraction} holds out {test}; lower one or add images"
            )
    position = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each image in its class
    limit = np.repeat(tests, counts)
    test = by_class[position < limit]
    labelled = by_class[(position >= limit) & (position < limit + config.labelled_per_class)]
    rest = by_class[position >= limit + config.labelled_per_class]
    unlabelled = {"training": np.concatenate([labelled, rest]), "rest": rest, "labelled": labelled}[
        config.unlabelled_from
    ]
    return Splits(images=images, test=np.sort(test), labelled=np.sort(labelled), unlabelled=np.sort(unlabelled))
