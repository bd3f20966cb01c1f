"""Source `idx`: the files of MNIST, Fashion-MNIST, KMNIST and EMNIST, plain or packed by gzip.

train-images-idx3-ubyte is 00 00 08 03, then the number of images, their height and width as big-endian 32-bit numbers,
then their grey bytes; train-labels-idx1-ubyte is 00 00 08 01, the number of labels, then a byte each. t10k-* is the
test part. The pixels are written out once, beside the index.
"""

from __future__ import annotations

import gzip
import math
import re
import string
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpl_scale.data.index.format import (
    CLASSES_FILE,
    BadLabel,
    Layout,
    MalformedShard,
    NoShards,
    Part,
    Scan,
    ScanOptions,
    Shard,
    classes_file,
    register_format,
)

_IMAGES = re.compile(r"(?:(?P<split>emnist-[a-z]+)-)?(?P<part>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_FOLDERS = ("", "raw/", "*/raw/")  # the last two are torchvision's
_MOST_IMAGES = 1 << 23
_LARGEST_IMAGE = _CHUNK = 1 << 24  # bytes

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_MERGED = string.digits + string.ascii_uppercase + "abdefghnqrt"
_CLASSES: dict[str, Sequence[str]] = {
    "mnist": string.digits,
    "fashion": _FASHION,
    "fashionmnist": _FASHION,
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnistmnist": string.digits,
    "emnistdigits": string.digits,
    "emnistletters": string.ascii_lowercase,
    "emnistbalanced": _MERGED,
    "emnistbymerge": _MERGED,
    "emnistbyclass": string.digits + string.ascii_uppercase + string.ascii_lowercase,
}
"""By the letters of a file's or folder's name."""


@register_format("idx")
class Idx:
    """One shard per file of images; the labels lie beside it."""

    layout: Layout = "grey"
    first_label: int | None = 0
    checksums = False

    def sidecars(self, root: Path) -> Sequence[str]:
        names = [shard.name for shard in self.shards(root)]
        packed = [f"{name}.gz" for name in names if not name.endswith(".gz")]  # must say the same
        return [*(name for images in names for name in _labels_names(images)), *packed, CLASSES_FILE]

    def shards(self, root: Path) -> Sequence[Shard]:
        sets: dict[Path, dict[Part, Shard]] = defaultdict(dict)
        for path in sorted(path for folder in _FOLDERS for path in root.glob(f"{folder}*-images?idx3-ubyte*")):
            match = _IMAGES.fullmatch(path.name)
            if match is not None and path.is_file():  # a plain file is sorted before its packed twin, and taken
                part: Part = "train" if match["part"] == "train" else "test"
                name = path.relative_to(root)
                sets[name.parent / (match["split"] or "")].setdefault(part, Shard(name.as_posix(), part))
        if len(sets) > 1:
            raise ValueError(
                f"mpl_scale.data.root = '{root}' holds {len(sets)} data sets, {', '.join(map(str, sorted(sets)))}; "
                "name the folder of one, and move those of other names away"
            )
        found = next(iter(sets.values()), {})
        if "train" not in found:
            raise NoShards(
                f"mpl_scale.data.root = '{root}' holds no train-images-idx3-ubyte, plain or .gz; name the folder of "
                "MNIST's files, or the one that torchvision downloads to"
            )
        return [found[part] for part in ("train", "test") if part in found]

    def classes(self, root: Path) -> Sequence[str] | None:
        train = root / self.shards(root)[0].name
        names = [train.name.partition("-train")[0], *reversed(train.parts[-3:-1])]
        known = (re.sub("[^a-z]", "", name.lower()) for name in names)
        return classes_file(root) or next((_CLASSES[name] for name in known if name in _CLASSES), None)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        path = root / shard.name
        try:
            _refuse_another(path, path.with_name(f"{path.name}.gz"))
            with _open(path) as file, open(unpacked, "wb") as pixels:
                count, height, width = _shape(file, dimensions=3)
                labels = _labels(path, count) if options.labels else np.zeros(count, np.uint8)
                turned = path.name.startswith("emnist-")  # its rows and columns are exchanged
                _copy(file, pixels, images=count, shape=(height, width), turned=turned)
        except MalformedShard as error:
            unpacked.unlink(missing_ok=True)
            return Scan.lost(shard, error)
        return Scan.of_pixels(labels, size=(width, height) if turned else (height, width), length=height * width)


def _labels_names(images: str) -> tuple[str, str]:
    """What the labels of a file of images may be called: plain, or packed."""
    folder, slash, name = images.rpartition("/")
    plain = f"{folder}{slash}{name.removesuffix('.gz').replace('images', 'labels').replace('idx3', 'idx1')}"
    return plain, f"{plain}.gz"


def _labels(images: Path, count: int) -> np.ndarray:
    """The labels of a file of images, uint8 [count]; BadLabel where there are none, or not one per image."""
    paths = [images.with_name(name) for name in _labels_names(images.name)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise BadLabel(f"there is no '{paths[0].name}', plain or .gz")
    try:
        _refuse_another(*paths)
        with _open(path) as file:
            (found,) = _shape(file, dimensions=1)
            if found != count:
                raise MalformedShard(f"{found} labels for {count} images")
            labels = _take(file, count)
            _refuse_more(file)
    except MalformedShard as error:
        raise BadLabel(f"'{path.name}': {error}") from error
    return labels


def _refuse_another(plain: Path, packed: Path) -> None:
    """BadLabel where a file is there plain and packed, and the two differ."""
    if not (plain.is_file() and packed.is_file()):
        return
    with open(plain, "rb") as one, _open(packed) as other:
        while content := one.read(1 << 20):
            if content != _read(other, len(content)):
                break
        else:
            if not _read(other, 1):
                return
    raise BadLabel(f"there is a '{packed.name}' of other content: which one is meant? Remove the other")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _shape(file: BinaryIO, *, dimensions: int) -> list[int]:
    """The header's numbers, each at least 1."""
    magic = bytes([0, 0, 8, dimensions])
    found = _take(file, 4).tobytes()
    if found != magic:
        raise MalformedShard(
            f"it begins with {found.hex(' ')}, not with {magic.hex(' ')}: no idx{dimensions} file of bytes"
        )
    shape = [int(side) for side in _take(file, 4 * dimensions).view(">u4")]
    if 0 in shape or shape[0] > _MOST_IMAGES or math.prod(shape[1:]) > _LARGEST_IMAGE:
        raise MalformedShard(
            f"its header says {shape}: nothing, or more than {_MOST_IMAGES} images of {_LARGEST_IMAGE} bytes"
        )
    return shape


def _copy(file: BinaryIO, pixels: BinaryIO, *, images: int, shape: tuple[int, int], turned: bool) -> None:
    """All images to another file, a few at a time; turned: rows and columns are exchanged."""
    size = math.prod(shape)
    most = max(1, _CHUNK // size)
    for start in range(0, images, most):
        some = _take(file, min(most, images - start) * size)
        pixels.write((some.reshape(-1, *shape).swapaxes(1, 2) if turned else some).tobytes())
    _refuse_more(file)


def _take(file: BinaryIO, count: int) -> np.ndarray:
    """The next bytes, uint8 [count]. Raises MalformedShard where the file ends before, or cannot be unpacked."""
    found = _read(file, count)
    if len(found) < count:
        raise MalformedShard("the file ends before what its header says")
    return np.frombuffer(found, np.uint8)


def _refuse_more(file: BinaryIO) -> None:
    if _read(file, 1):
        raise MalformedShard("the file holds more than its header says")


def _read(file: BinaryIO, most: int) -> bytes:
    try:
        return file.read(most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MalformedShard(f"it cannot be unpacked: {error}") from error
