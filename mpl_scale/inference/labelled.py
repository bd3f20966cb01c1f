"""Labelled images to evaluate a trained network on, with the labels as the network counts its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from mpl_scale.config import Config
from mpl_scale.data import ImageFiles, ImageSet, load_data, load_images, make_splits
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.joined import APART, JoinedImages, are_numbers
from mpl_scale.data.samples.manifest import hash_files
from mpl_scale.data.vectors import LENGTHS


@dataclass(frozen=True)
class DataChoice:
    """A data set beside the run's own. label_offset, index: as of mpl_scale.data; root: None: the run's test part."""

    root: Path | None = None
    source: str = "folder"
    index: Path | None = None
    label_offset: int | None = None


@dataclass(frozen=True)
class LabelledImages:
    """An ImageSet of some samples of another one, numbered from 0.

    ids: int64 [n], ascending, of `images`. places: int64 [C], the network's class of each class of `images`.
    """

    images: ImageSet
    ids: np.ndarray
    places: np.ndarray
    classes: Sequence[str]
    refused: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "refused", np.flatnonzero(np.isin(self.ids, self.images.refused)))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [n], of the network's classes."""
        return self.places[self.images.labels[self.ids]]

    @property
    def sizes(self) -> np.ndarray:
        """int32 [n, 2], height and width, pixels."""
        return self.images.sizes[self.ids]

    @property
    def bad(self) -> int:
        """How many of them were refused."""
        return len(self.refused)

    def read(self, sample: int) -> np.ndarray:
        """The encoded image."""
        return self.images.read(int(self.ids[sample]))

    def name(self, sample: int) -> str:
        """Where it is."""
        return self.images.name(int(self.ids[sample]))

    def refusals(self, most: int) -> Mapping[str, str]:
        """The first things refused in the whole set: reason by name."""
        return self.images.refusals(most)


def load_labelled(config: Config, choice: DataChoice, *, classes: Sequence[str] | None) -> LabelledImages:
    """The test part of the run's data, or of another set: all of it, where it has no test part of its own.

    Args:
        config: of the run.
        choice: of the data.
        classes: names of the network's classes, by label; None: unknown.

    Raises:
        ValueError: as load_images and make_splits; classes that the network does not know.
    """
    if config.data.source in LENGTHS and choice.root is None and choice.index is None:
        raise ValueError(f"the run's source {config.data.source} has vectors; give images with --data")
    known = list(classes) if classes is not None else None
    if choice.root is None and choice.index is None:
        images = load_data(config)
        ids = make_splits(images, config=config.data, seed=config.seed).test
    else:
        own = {"source": choice.source, "root": _text(choice.root), "index": _text(choice.index)}
        own |= dict.fromkeys(APART)
        images = load_images(config.data.model_copy(update={**own, "label_offset": choice.label_offset}))
        ids = np.arange(len(images), dtype=np.int64)
        if isinstance(images, ImageFiles | IndexedImages) and len(test := images.ids_of("test")):
            ids = test
    places = _places(images.classes, known, count=config.model.num_classes)
    return LabelledImages(images, ids, places, known or list(images.classes))


def describe(images: ImageSet) -> str:
    """Stands for the whole data set."""
    if isinstance(images, IndexedImages | JoinedImages):
        return images.fingerprint
    return hash_files(images) if isinstance(images, ImageFiles) else str(len(images))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _places(found: Sequence[str], known: list[str] | None, *, count: int) -> np.ndarray:
    """The network's class of each class of the data, int64: by name, or by number where one side has no names."""
    names = [str(name) for name in found]
    if known is not None and set(names) <= set(known):
        return np.array([known.index(name) for name in names], np.int64)
    if len(names) == count and (known is None or are_numbers(names) or are_numbers(known)):
        return np.arange(count, dtype=np.int64)
    others = [name for name in names if known is None or name not in known]
    raise ValueError(
        f"the data have {len(names)} classes and the network {count}; unknown to it: {', '.join(others[:5])}"
        f"{f' and {len(others) - 5} more' if len(others) > 5 else ''}; name the classes as in training"
        f"{f', {known[0]} to {known[-1]}' if known else ''}"
    )
