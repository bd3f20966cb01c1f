"""Unlabelled images of a further index in place of a split's own: JFT beside ImageNet (sections 3.3 and 4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.joined import UNLABELLED_INDEX, JoinedImages
from mpl_scale.data.registry import refuse_damaged
from mpl_scale.data.samples.splits import Splits


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
    joined = JoinedImages((splits.images, second), ("", UNLABELLED_INDEX))
    return replace(splits, images=joined, unlabelled=usable)
