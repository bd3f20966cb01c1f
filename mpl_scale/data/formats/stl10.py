"""Source `stl10`: STL-10's binary files, of 96 x 96 images: 5,000 labelled, 8,000 to test on, 100,000 without labels.

train_X.bin, test_X.bin and unlabeled_X.bin hold 3 planes of 96 x 96 bytes per image, column by column, and are read
where they lie. train_y.bin and test_y.bin hold a byte per image, 1 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpl_scale.data.index.format import (
    BadLabel,
    Layout,
    MalformedShard,
    NoShards,
    Part,
    PlainFormat,
    Scan,
    ScanOptions,
    Shard,
    existing,
    refuse_other_names,
    register_format,
)

SIDE = 96
_PIXELS = 3 * SIDE * SIDE
_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_PARTS: tuple[tuple[str, Part], ...] = (
    ("train_X.bin", "train"),
    ("unlabeled_X.bin", "unlabelled"),
    ("test_X.bin", "test"),
)
_FOLDERS = ("", "stl10_binary/")  # the folder that the archive unpacks to, or the one it lies in


@register_format("stl10")
class Stl10(PlainFormat):
    """One shard per file of images; the labels lie beside it."""

    layout: Layout = "columns"

    def sidecars(self, root: Path) -> Sequence[str]:
        return [_labels_name(shard.name) for shard in self.shards(root) if shard.part != "unlabelled"]

    def shards(self, root: Path) -> Sequence[Shard]:
        found = existing(root, _PARTS, folders=_FOLDERS)
        if not any(shard.part == "train" for shard in found):
            raise NoShards(
                f"mpl_scale.data.root = '{root}' holds no train_X.bin; name the folder that stl10_binary.tar.gz "
                "unpacks to, or the one it was unpacked in"
            )
        names = (root / found[0].name).with_name("class_names.txt")
        if names.is_file():
            refuse_other_names(names, names.read_text(encoding="utf-8", errors="replace").split(), _CLASSES)
        return found

    def classes(self, root: Path) -> Sequence[str]:
        return _CLASSES

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        path = root / shard.name
        count, rest = divmod(path.stat().st_size, _PIXELS)
        try:
            if rest or not count:
                raise MalformedShard(
                    f"it is empty, or ends {rest} bytes into an image; unpack stl10_binary.tar.gz again",
                    offset=count * _PIXELS,
                )
            if shard.part == "unlabelled" or not options.labels:
                labels = np.zeros(count, np.int64)
            else:
                labels = _labels(path.with_name(_labels_name(path.name)), count)
        except MalformedShard as error:
            return Scan.lost(shard, error)
        return Scan.of_pixels(labels, size=(SIDE, SIDE), length=_PIXELS)


def _labels_name(images: str) -> str:
    return images.replace("_X.bin", "_y.bin")


def _labels(path: Path, count: int) -> np.ndarray:
    """The labels counted from 0, int64 [count]; BadLabel where the file holds anything else."""
    found = path.stat().st_size if path.is_file() else 0
    if found != count:
        raise BadLabel(f"'{path.name}' is missing, or holds {found} labels for {count} images")
    labels = np.fromfile(path, np.uint8).astype(np.int64)
    outside = np.flatnonzero((labels < 1) | (labels > len(_CLASSES)))
    if len(outside):
        raise BadLabel(f"'{path.name}' gives image {outside[0]} the label {labels[outside[0]]}, not 1 to 10")
    return labels - 1
