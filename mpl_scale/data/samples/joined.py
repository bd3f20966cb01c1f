"""Two image sets as one: the unlabelled images from an index of their own (JFT beside ImageNet, sections 3.3 and 4)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.registry import ImageSet, refuse_damaged
from mpl_scale.data.samples.splits import Splits


@dataclass(frozen=True)
class JoinedImages:
    """An ImageSet of `first` with `second` behind it; sample i of `second` has the id len(first) + i.

    Labels and sizes are copied into memory, 16 bytes an image.
    """

    first: ImageSet
    second: ImageSet

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]; of `second`, whatever its index says: nothing learns from them."""
        return np.concatenate([self.first.labels, self.second.labels])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Heights and widths, int32 [N, 2]."""
        return np.concatenate([self.first.sizes, self.second.sizes])

    @property
    def classes(self) -> Sequence[str]:
        """Class names of `first`."""
        return self.first.classes

    @cached_property
    def refused(self) -> np.ndarray:
        """Sample ids of refused images, int64 [R], sorted."""
        return np.concatenate([self.first.refused, self.second.refused + len(self.first)])

    @property
    def bad(self) -> int:
        """Number of refused images in both sets."""
        return self.first.bad + self.second.bad

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, from the set that the sample belongs to."""
        images, own = self._of(sample)
        return images.read(own)

    def name(self, sample: int) -> str:
        """The sample's name in the set that it belongs to."""
        images, own = self._of(sample)
        return images.name(own)

    def refusals(self, most: int) -> Mapping[str, str]:
        """The first ones, those of `first` before those of `second`."""
        both = {**self.first.refusals(most), **self.second.refusals(most)}
        return dict(itertools.islice(both.items(), most))

    def tested(self, test: np.ndarray) -> list[str]:
        """For people: shards of `second` that are, byte for byte, shards of `first` with test images.

        test: the ids of these, int64.
        """
        if not (isinstance(self.first, IndexedImages) and isinstance(self.second, IndexedImages)):
            return []
        own = {digest: number for number, digest in enumerate(self.first.meta.get("contents", ())) if digest}
        found = []
        for number, digest in enumerate(self.second.meta.get("contents", ())):
            twin = own.get(digest)
            if twin is None or not len(self.second.ids_of_shards([number])):
                continue
            if np.isin(self.first.ids_of_shards([twin]), test).any():
                found.append(
                    f"'{self.second.shards[number].name}' of mpl_scale.data.unlabelled_index is "
                    f"'{self.first.shards[twin].name}' again, which holds test images: they may be unlabelled ones, too"
                )
        return found

    def _of(self, sample: int) -> tuple[ImageSet, int]:
        own = sample - len(self.first)
        return (self.first, sample) if own < 0 else (self.second, own)


def with_unlabelled(splits: Splits, folder: Path, *, allow_damaged: bool = False) -> Splits:
    """The splits with all images of an index, instead of their own, as the unlabelled ones.

    Raises:
        ValueError: `folder` is no index, its shards have changed, or are damaged and that is not allowed.
    """
    try:
        second = IndexedImages(folder, root_setting=None)
        refuse_damaged(second, allowed=allow_damaged)
    except ValueError as error:
        raise ValueError(f"mpl_scale.data.unlabelled_index: {error}") from error
    first = len(splits.images)
    ids = np.arange(first, first + len(second), dtype=np.int64)
    usable = np.delete(ids, second.refused) if len(second.refused) else ids
    return replace(splits, images=JoinedImages(splits.images, second), unlabelled=usable)
