"""Source `arrays`: images.npy, uint8 [N, H, W, C] or grey [N, H, W], and labels.npy, [N], read where they lie.

test_images.npy and test_labels.npy beside them are the test part.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpl_scale.data.index.format import (
    CLASSES_FILE,
    BadLabel,
    Layout,
    MalformedShard,
    NoShards,
    Scan,
    ScanOptions,
    Shard,
    classes_file,
    existing,
    register_format,
)

_LONGEST_HEADER = 4096  # bytes
_MOST_CHANNELS = 256  # those of mpl_scale.model.in_chans
_HEADER = re.compile(
    rb"\x93NUMPY(?:(?P<version>\x01)\0..|[\x02\x03]\0....)\{'descr': '(?P<dtype>[<>|](?:[iu][1248]|f[248]))', "
    rb"'fortran_order': False, 'shape': \((?P<shape>[0-9, ]{0,100})\), \}",
    re.DOTALL,
)


@register_format("arrays")
class Arrays:
    """One shard per pair of files, named after the images."""

    layout: Layout = "rows"
    first_label: int | None = 0
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        return ("labels.npy", "test_labels.npy", CLASSES_FILE)

    def shards(self, root: Path) -> Sequence[Shard]:
        found = existing(root, [("images.npy", "train"), ("test_images.npy", "test")])
        if not found or found[0].part != "train":
            raise NoShards(
                f"mpl_scale.data.root = '{root}' holds no images.npy; write uint8 [N, H, W, C] or [N, H, W] there, "
                "and labels.npy"
            )
        if (root / "test_labels.npy").exists() and len(found) == 1:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds test_labels.npy and no test_images.npy; add it, or remove the "
                "labels"
            )
        return found

    def classes(self, root: Path) -> Sequence[str] | None:
        return classes_file(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        path = root / shard.name
        try:
            images, offset = read_npy(path)
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] > (_MOST_CHANNELS,):
                raise MalformedShard(f"{images.dtype} {list(images.shape)} is not uint8 [N, H, W, C], nor [N, H, W]")
            labels = np.zeros(len(images), np.int64)
            if options.labels:
                labels = _labels(path.with_name(path.name.replace("images", "labels")), len(images))
        except MalformedShard as error:
            return Scan.lost(shard, error)
        _, height, width, *_ = images.shape
        return Scan.of_pixels(labels, size=(height, width), length=math.prod(images.shape[1:]), first=offset)


def _labels(path: Path, count: int) -> np.ndarray:
    """The labels, int64 [count]; BadLabel where the file holds anything else."""
    try:
        labels, _ = read_npy(path)
    except MalformedShard as error:
        raise BadLabel(f"no labels: {error}") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != count:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise BadLabel(f"'{path.name}' holds {found}, not one whole number per image, [{count}]")
    if labels.dtype == np.uint64 and (largest := int(labels.max())) > np.iinfo(np.int64).max:
        raise BadLabel(f"'{path.name}' holds {largest}, which is no class; -1 stored as uint64 reads so")
    return labels.astype(np.int64)


def read_npy(path: Path) -> tuple[np.ndarray, int]:
    """A memory-mapped array of numbers, and the byte at which its data begin.

    The header is matched, not evaluated: numpy's own reader lets Python's parser loose on it.

    Raises:
        MalformedShard: it cannot be read, holds something else, or is not in C order.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_LONGEST_HEADER)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise MalformedShard(f"'{path.name}' cannot be read: {error.strerror}") from error
    match = _HEADER.match(head)
    if match is None:
        raise MalformedShard(f"'{path.name}' is no .npy file of plain numbers in C order")
    first = 10 if match["version"] == b"\x01" else 12
    offset = first + int.from_bytes(head[8:first], "little")
    shape = tuple(int(side) for side in match["shape"].replace(b",", b" ").split())
    dtype = np.dtype(match["dtype"].decode())
    count = math.prod(shape)
    if not count or len(shape) > 8:
        raise MalformedShard(f"'{path.name}' holds nothing, or has more than 8 dimensions")
    if offset < match.end() or offset + count * dtype.itemsize > size:
        raise MalformedShard(f"'{path.name}' ends before its {count} numbers do")
    beyond = size - offset - count * dtype.itemsize
    if beyond:
        raise MalformedShard(f"'{path.name}' holds {beyond} bytes after its {count} numbers, as of a second array")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape), offset
