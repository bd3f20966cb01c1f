"""Data sources by name: each turns `mpl_scale.data.root` into an ImageSet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mpl_scale.config.names import Registry, require_known
from mpl_scale.config.schema import DataConfig
from mpl_scale.data.probe import UnreadableImage, probe


class ImageSet(Protocol):
    """Labelled, encoded images; a sample id is an index into the arrays, which may lie on disk (memory-mapped)."""

    @property
    def labels(self) -> np.ndarray:
        """Integers [N], in [0, len(classes))."""

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], height and width of the encoded image, pixels."""

    @property
    def classes(self) -> Sequence[str]:
        """Names."""

    def __len__(self) -> int: ...

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, uint8 [bytes]. Raises UnreadableImage with the reason."""

    def name(self, sample: int) -> str:
        """Where it is, for people: a path, or a path and an offset."""


@dataclass(frozen=True)
class ImageFiles:
    """An ImageSet of one file per image."""

    paths: np.ndarray  # str [N]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int32 [N, 2]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> np.ndarray:
        """The whole file, if it passes the probe."""
        try:
            with open(self.paths[sample], "rb", buffering=0) as file:
                encoded = file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error
        probe(encoded, encoded)
        return np.frombuffer(encoded, np.uint8)

    def name(self, sample: int) -> str:
        """The path."""
        return str(self.paths[sample])


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
