"""Sources `cifar10`, in the binary or the Python version, and `cifar100`, in the Python version, with its fine labels.

The binary version is read where it lies: one byte of label, then 3 x 32 x 32 bytes. Of the Python version (pickles,
read by pickled.py without running them) the pixels are written out once, beside the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.formats.pickled import read_pickle
from mpl_scale.data.index.format import (
    LOST_REST,
    LOST_WHOLE,
    BadLabel,
    Layout,
    MalformedShard,
    NoShards,
    Part,
    PlainFormat,
    Refusal,
    Scan,
    ScanOptions,
    Shard,
    existing,
    refuse_other_names,
    register_format,
)

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_RECORD = 1 + _PIXELS
CLASSES_100 = 100
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES: tuple[tuple[str, Part], ...] = (*((f"data_batch_{n}", "train") for n in range(1, 6)), ("test_batch", "test"))
_BINARY = ("", "cifar-10-batches-bin/")  # the folder that the archive unpacks to, or the one it lies in
_PYTHON = ("", "cifar-10-batches-py/")
_PYTHON_100 = ("", "cifar-100-python/")
_BATCHES_100: tuple[tuple[str, Part], ...] = (("train", "train"), ("test", "test"))
_LONGEST_PICKLE = 1 << 30  # bytes; CIFAR-100's training images have 155 MB


@register_format("cifar10")
class Cifar10(PlainFormat):
    """CIFAR-10 in either version; images are in the order of the files (appendix C.1)."""

    layout: Layout = "planes"

    def shards(self, root: Path) -> Sequence[Shard]:
        binary = existing(root, [(f"{name}.bin", part) for name, part in _BATCHES], folders=_BINARY)
        python = existing(root, _BATCHES, folders=_PYTHON)
        if not any(shard.part == "train" for shard in binary or python):
            raise NoShards(
                f"mpl_scale.data.root = '{root}' holds no data_batch_1.bin (binary version) nor data_batch_1 (Python "
                "version); name the folder that the archive of CIFAR-10 unpacks to, or the one it was unpacked in"
            )
        found = binary or python
        names = {Path(shard.name).stem for shard in found}
        absent = [name for name, part in _BATCHES if part == "train" and name not in names]
        if absent:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds {found[0].name} but not {', '.join(absent)}; unpack the archive "
                "of CIFAR-10 again"
            )
        self._refuse_other_names(root / Path(found[0].name).parent)
        return found

    def _refuse_other_names(self, folder: Path) -> None:
        """ValueError where the names beside the batches are not CIFAR-10's: they would be told wrong."""
        text, pickled = folder / "batches.meta.txt", folder / "batches.meta"
        if text.is_file():
            lines = text.read_text(encoding="utf-8", errors="replace").split("\n")
            refuse_other_names(text, [line.strip() for line in lines if line.strip()], _CLASSES)
        if pickled.is_file():
            with suppress(MalformedShard):
                (names,) = _read_dict(pickled, "label_names")
                refuse_other_names(pickled, names if isinstance(names, list) else (), _CLASSES)

    def classes(self, root: Path) -> Sequence[str]:
        return _CLASSES

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        path = root / shard.name
        if path.suffix == ".bin":
            return _scan_binary(path, shard)
        return _scan_python(path, shard, unpacked, labels="labels")


@register_format("cifar100")
class Cifar100(PlainFormat):
    """CIFAR-100, Python version: 100 classes by their fine labels; the 20 coarse ones are not read."""

    layout: Layout = "planes"

    def sidecars(self, root: Path) -> Sequence[str]:
        return [self._meta(root)]

    def shards(self, root: Path) -> Sequence[Shard]:
        found = existing(root, _BATCHES_100, folders=_PYTHON_100)
        if not any(shard.part == "train" for shard in found):
            raise NoShards(
                f"mpl_scale.data.root = '{root}' holds no file train (Python version); name the folder that "
                "cifar-100-python.tar.gz unpacks to, or the one it was unpacked in"
            )
        return found

    def classes(self, root: Path) -> Sequence[str]:
        path = root / self._meta(root)
        try:
            return read_names(path)
        except (OSError, MalformedShard) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"'{path}' holds no class names: {reason}; unpack cifar-100-python.tar.gz again"
            ) from error

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        return _scan_python(root / shard.name, shard, unpacked, labels="fine_labels")

    def _meta(self, root: Path) -> str:
        return str(Path(self.shards(root)[0].name).with_name("meta"))


def read_batch(path: Path, *, labels: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3, 32, 32] and labels int64 [n] of a batch of the Python version.

    labels: their key.

    Raises:
        MalformedShard: the file is no such batch.
    """
    data, found, coarse = _read_dict(path, "data", labels, optional=("coarse_labels",))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS or not len(data):
        raise MalformedShard(f"data is no uint8 [n, {_PIXELS}]")
    if not isinstance(found, list) or len(found) != len(data) or not all(type(label) is int for label in found):
        raise BadLabel(f"{labels} is no list of one whole number per image")
    _compare_coarse(found, coarse)
    clipped = [label if 0 <= label < 1 << 31 else -1 for label in found]
    return data.reshape(-1, 3, SIDE, SIDE), np.array(clipped, np.int64)


def _compare_coarse(fine: list[int], coarse: Any) -> None:
    """BadLabel where images of one fine class are of several of the 20 coarse ones, which hold whole classes."""
    if not isinstance(coarse, list) or len(coarse) != len(fine) or not all(type(group) is int for group in coarse):
        return
    first: dict[int, int] = {}
    for row, (label, group) in enumerate(zip(fine, coarse, strict=True)):
        if first.setdefault(label, group) != group:
            raise BadLabel(f"image {row} of fine label {label} has coarse label {group}, another has {first[label]}")


def read_names(path: Path) -> list[str]:
    """The names of CIFAR-100's fine labels, in their order.

    Raises:
        MalformedShard: the file does not hold 100 different ones.
        OSError: it cannot be read.
    """
    (found,) = _read_dict(path, "fine_label_names")
    names = found if isinstance(found, list) else []
    if not all(isinstance(name, str) for name in names) or (len(names), len(set(names))) != (CLASSES_100, CLASSES_100):
        raise MalformedShard(f"fine_label_names is no list of {CLASSES_100} names")
    return names


def _read_dict(path: Path, *keys: str, optional: Sequence[str] = ()) -> list[Any]:
    """The values of a pickled dict, whose keys may be text or bytes; None where there is none."""
    if path.stat().st_size > _LONGEST_PICKLE:
        raise MalformedShard(f"a pickle of more than {_LONGEST_PICKLE} bytes")
    found: Any = read_pickle(path.read_bytes())
    if not isinstance(found, dict):
        raise MalformedShard(f"no dict of {' and '.join(keys)}")
    for key in (*keys, *optional):
        if key in found and key.encode() in found:
            raise BadLabel(f"it holds {key} twice, as text and as bytes")
    return [found.get(key, found.get(key.encode())) for key in (*keys, *optional)]


def _scan_python(path: Path, shard: Shard, unpacked: Path, *, labels: str) -> Scan:
    try:
        pixels, found = read_batch(path, labels=labels)
    except MalformedShard as error:
        return Scan.lost(shard, error)
    unpacked.write_bytes(pixels.data)
    return Scan.of_pixels(found, size=(SIDE, SIDE), length=_PIXELS)


def _scan_binary(path: Path, shard: Shard) -> Scan:
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    count, rest = divmod(len(content), _RECORD)
    labels = content[: count * _RECORD : _RECORD]
    scan = Scan.of_pixels(labels, size=(SIDE, SIDE), length=_PIXELS, first=1, stride=_RECORD)
    if rest or not count:
        reason = f"{LOST_REST}: the file ends {rest} bytes into an image" if rest else f"{LOST_WHOLE}: it is empty"
        scan.refusals.append(Refusal(shard.name, count * _RECORD, reason))
    return scan
