"""Source `cifar10`: the five training batches and the test batch, in the binary or the Python version.

The binary version is read where it lies: one byte of label, then 3 x 32 x 32 bytes. Of the Python version (pickles,
read by pickled.py without running them) the pixels are written out once, beside the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.formats.pickled import read_pickle
from mpl_scale.data.index.format import (
    ENTRY,
    LOST_REST,
    LOST_WHOLE,
    BadLabel,
    Layout,
    MalformedShard,
    Part,
    PlainFormat,
    Refusal,
    Scan,
    ScanOptions,
    Shard,
    existing,
    register_format,
)

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_RECORD = 1 + _PIXELS
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES: tuple[tuple[str, Part], ...] = (*((f"data_batch_{n}", "train") for n in range(1, 6)), ("test_batch", "test"))
_LONGEST_PICKLE = 1 << 30  # bytes; a batch of 10,000 images has 31 MB


@register_format("cifar10")
class Cifar10(PlainFormat):
    """CIFAR-10 in either version; images are in the order of the files (appendix C.1)."""

    layout: Layout = "planes"

    def shards(self, root: Path) -> Sequence[Shard]:
        binary = existing(root, [(f"{name}.bin", part) for name, part in _BATCHES])
        python = existing(root, _BATCHES)
        if not any(shard.part == "train" for shard in binary or python):
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds no data_batch_1.bin (binary version) nor data_batch_1 (Python "
                "version); name the folder that the archive of CIFAR-10 unpacks to"
            )
        found = binary or python
        names = {shard.name.removesuffix(".bin") for shard in found}
        absent = [name for name, part in _BATCHES if part == "train" and name not in names]
        if absent:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds {found[0].name} but not {', '.join(absent)}; unpack the archive "
                "of CIFAR-10 again"
            )
        return found

    def classes(self, root: Path) -> Sequence[str]:
        return _CLASSES

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        path = root / shard.name
        if path.suffix == ".bin":
            return _scan_binary(path, shard)
        try:
            pixels, labels = read_batch(path)
        except MalformedShard as error:
            return Scan.lost(shard, error)
        unpacked.write_bytes(pixels.tobytes())
        return _scan(shard, labels, first=0, stride=_PIXELS)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3, 32, 32] and labels int64 [n] of a batch of the Python version.

    Raises:
        MalformedShard: the file is no such batch.
    """
    if path.stat().st_size > _LONGEST_PICKLE:
        raise MalformedShard(f"a pickle of more than {_LONGEST_PICKLE} bytes")
    batch: Any = read_pickle(path.read_bytes())
    if not isinstance(batch, dict):
        raise MalformedShard("no dict of data and labels")
    data, labels = (batch.get(key, batch.get(key.encode())) for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise MalformedShard(f"data is no uint8 [n, {_PIXELS}]")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise BadLabel("labels are no list of one whole number per image")
    clipped = [label if 0 <= label < 1 << 31 else -1 for label in labels]
    return data.reshape(-1, 3, SIDE, SIDE), np.array(clipped, np.int64)


def _scan_binary(path: Path, shard: Shard) -> Scan:
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    count, rest = divmod(len(content), _RECORD)
    scan = _scan(shard, content[: count * _RECORD : _RECORD].astype(np.int64), first=1, stride=_RECORD)
    if rest or not count:
        reason = f"{LOST_REST}: the file ends {rest} bytes into an image" if rest else f"{LOST_WHOLE}: it is empty"
        scan.refusals.append(Refusal(shard.name, count * _RECORD, reason))
    return scan


def _scan(shard: Shard, labels: np.ndarray, *, first: int, stride: int) -> Scan:
    """Images of `stride` bytes each, the first one's pixels at byte `first`."""
    entries = np.zeros(len(labels), ENTRY)
    entries["offset"] = first + np.arange(len(labels)) * stride
    entries["length"] = _PIXELS
    entries["label"] = labels
    entries["height"] = entries["width"] = SIDE
    return Scan(entries)
