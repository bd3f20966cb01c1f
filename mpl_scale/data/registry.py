"""Data sources by name: each turns `mpl_scale.data.root` into an ImageSet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import DataConfig


@dataclass(frozen=True)
class ImageSet:
    """Labelled image files; a sample id is an index into these arrays."""

    paths: np.ndarray  # str [N]
    labels: np.ndarray  # int64 [N], in [0, len(classes))
    sizes: np.ndarray  # int32 [N, 2], height and width in the file, pixels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


Source = Callable[[Path | None], ImageSet]
SOURCES: Registry[Source] = Registry("data source")
register_source = SOURCES.register
"""Make a function `(root or None) -> ImageSet` available as `mpl_scale.data.source`."""


def load_images(config: DataConfig) -> ImageSet:
    """The files of the configured source, every header checked.

    Raises:
        ValueError: unknown source, missing root, or an unreadable image; each says how to mend it.
    """
    require_known("mpl_scale.data.source", config.source, SOURCES)
    return SOURCES[config.source](None if config.root is None else Path(config.root).expanduser())
