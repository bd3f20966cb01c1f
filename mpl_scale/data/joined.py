"""Several image sets as one: those of mpl_scale.data.labelled, unlabelled, validation and test, or a further index.

The unlabelled images may come from an index of their own (JFT beside ImageNet, sections 3.3 and 4).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpl_scale.config.schema import Config, DataConfig, PlaceConfig
from mpl_scale.data.formats.synthetic import SyntheticImages
from mpl_scale.data.index.format import Part
from mpl_scale.data.index.reader import IndexedImages, concatenate
from mpl_scale.data.registry import ImageSet, load_place, load_source

UNLABELLED_INDEX = "unlabelled_index"
APART = ("labelled", "unlabelled", "validation", "test")
"""Fields of mpl_scale.data that name a place each, or several."""
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


@dataclass(frozen=True)
class JoinedImages:
    """An ImageSet of several, one behind another: sample i of a set has the id i + all images before that set.

    Labels and sizes are copied into memory, 16 bytes an image.

    sets: the first one has the classes. names: of each, the field of mpl_scale.data that it comes from.
    """

    sets: tuple[ImageSet, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> np.ndarray:
        """int64 [sets + 1]: the id that each set begins at, and the number of all images."""
        return np.cumsum([0, *map(len, self.sets)])

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N], by the classes of the first set; of unlabelled images, whatever their index says."""
        found = []
        for images, name in zip(self.sets, self.names, strict=True):
            evaluated = name in ("validation", "test")
            places = class_places(images.classes, self.classes, name=name) if evaluated else None
            found.append(images.labels if places is None else places[images.labels])
        return np.concatenate(found)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Heights and widths, int32 [N, 2]."""
        return np.concatenate([images.sizes for images in self.sets])

    @cached_property
    def kinds(self) -> np.ndarray:
        """uint64 [N], of sets that are indexes: a hash of the length in bytes and the size in pixels of each image."""
        lengths = np.concatenate([images.lengths for images in self.sets if isinstance(images, IndexedImages)])
        height, width = self.sizes.astype(np.uint64).T
        return lengths.astype(np.uint64) * _PRIMES[0] + height * _PRIMES[1] + width * _PRIMES[2]

    @property
    def classes(self) -> Sequence[str]:
        """Class names of the first set."""
        return self.sets[0].classes

    @cached_property
    def refused(self) -> np.ndarray:
        """Sample ids of refused images, int64 [R], sorted."""
        return np.concatenate([images.refused + first for images, first in zip(self.sets, self._starts, strict=False)])

    @property
    def bad(self) -> int:
        """Number of refused images in all sets."""
        return sum(images.bad for images in self.sets)

    def ids_of(self, name: str, *parts: Part) -> np.ndarray:
        """The samples of a field's sets, int64, sorted; parts: of the sets' own parts, none: of all."""
        found = [
            first + (np.arange(len(images)) if not parts else concatenate([images.ids_of(part) for part in parts]))
            for images, own, first in zip(self.sets, self.names, self._starts, strict=False)
            if own == name and isinstance(images, IndexedImages)
        ]
        return concatenate(found)

    def named(self, name: str) -> list[ImageSet]:
        """The sets of a field."""
        return [images for images, own in zip(self.sets, self.names, strict=True) if own == name]

    @property
    def fingerprint(self) -> str:
        """Stands for the content of all sets, which are indexes, and for what they are used for."""
        pairs = zip(self.names, self.sets, strict=True)
        said = "".join(f"{name} {images.fingerprint};" for name, images in pairs if isinstance(images, IndexedImages))
        return hashlib.sha256(said.encode()).hexdigest()

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, from the set that the sample belongs to."""
        images, own = self._of(sample)
        return images.read(own)

    def name(self, sample: int) -> str:
        """The sample's name in the set that it belongs to."""
        images, own = self._of(sample)
        return images.name(own)

    def refusals(self, most: int) -> Mapping[str, str]:
        """The first ones, set by set."""
        found: dict[str, str] = {}
        for images in self.sets:
            found.update(images.refusals(most))
        return dict(itertools.islice(found.items(), most))

    def tested(self, test: np.ndarray) -> list[str]:
        """For people: shards of `unlabelled_index` that are, byte for byte, shards of the first set with test images.

        test: the ids of these, int64.
        """
        first, second = self.sets
        if not (isinstance(first, IndexedImages) and isinstance(second, IndexedImages)):
            return []
        own = {digest: number for number, digest in enumerate(first.meta.get("contents", ())) if digest}
        found = []
        for number, digest in enumerate(second.meta.get("contents", ())):
            twin = own.get(digest)
            if twin is None or not len(second.ids_of_shards([number])):
                continue
            if np.isin(first.ids_of_shards([twin]), test).any():
                found.append(
                    f"'{second.shards[number].name}' of mpl_scale.data.unlabelled_index is "
                    f"'{first.shards[twin].name}' again, which holds test images: they may be unlabelled ones, too"
                )
        return found

    def _of(self, sample: int) -> tuple[ImageSet, int]:
        number = int(np.searchsorted(self._starts, sample, "right")) - 1
        return self.sets[number], sample - int(self._starts[number])


def load_data(config: Config) -> ImageSet:
    """The images of a run: made up, or as load_images."""
    return SyntheticImages.of(config) if config.data.is_synthetic else load_images(config.data)


def load_images(config: DataConfig) -> ImageSet:
    """The images of a data section, every header checked: of one source, or of `labelled` and the other places.

    Raises:
        ValueError: as registry.load_source and load_place; parts whose classes are not those of `labelled`.
    """
    if config.labelled is None:
        return load_source(config)
    sets, names = [], []
    for name in APART:
        places = places_of(config, name)
        for number, place in enumerate(places):
            field = f"mpl_scale.data.{name}{f'[{number}]' if len(places) > 1 else ''}"
            sets.append(load_place(place, config, field=field, labels=name != "unlabelled"))
            names.append(name)
    joined = JoinedImages(tuple(sets), tuple(names))
    assert len(joined.labels) == len(joined)  # classes are compared now
    return joined


def places_of(config: DataConfig, name: str) -> list[PlaceConfig]:
    """The places of a field of APART, none where it is null."""
    given = getattr(config, name)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return [PlaceConfig(root=place) if isinstance(place, str) else place for place in listed]


def class_places(found: Sequence[str], known: Sequence[str], *, name: str) -> np.ndarray:
    """The class, as `known` numbers them, of each one found: int64. By name, or by number where one side has no names.

    name: of the field that `found` is of.

    Raises:
        ValueError: they are not the same ones.
    """
    names, first = [str(text) for text in found], [str(text) for text in known]
    if sorted(names) == sorted(first):
        return np.array([first.index(text) for text in names], np.int64)
    if len(names) == len(first) and (are_numbers(names) or are_numbers(first)):
        return np.arange(len(first), dtype=np.int64)
    differ = [f"'{text}'" for text in (*names, *first) if (text in names) != (text in first)]
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    raise ValueError(
        f"mpl_scale.data.{name} has {len(names)} classes and mpl_scale.data.labelled has {len(first)}; only one of the "
        f"two has {', '.join(differ[:5])}{more}; give both the same classes"
    )


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names only count the classes, as those of a format without names do."""
    return all(name == f"class {number}" for number, name in enumerate(names))
