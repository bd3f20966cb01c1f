"""Small data sets of given labels, and their indexes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import load_images
from mpl_scale.data.index.reader import IndexedImages
from tests.support import mini_imagenet as mini

FIRST_LABEL = {"tfrecord": 1, "webdataset": 0, "parquet": 0, "arrow": 0, "arrays": 0, "idx": 0, "table": 0}
"""Formats whose labels may start anywhere, and where they start by custom."""


def feature(number: int, *values: bytes) -> bytes:
    """A Feature of bytes (1), floats (2) or integers (3), each value a field of its own."""
    return mini.field(number, b"".join(mini.field(1, value) for value in values))


def example(**features: bytes) -> bytes:
    named = {"image/encoded": feature(1, mini.files()[0])} | {
        name.replace("__", "/"): value for name, value in features.items()
    }
    return mini.field(
        1, b"".join(mini.field(1, mini.field(1, name.encode()) + mini.field(2, v)) for name, v in named.items() if v)
    )


def write(root: Path, source: str, labels: list[int], *, test: list[int] | None = None) -> Path:
    """A data set of these labels, and of these in its test part."""
    root.mkdir(parents=True, exist_ok=True)
    images = mini.files()
    for part, numbers in (("train", labels), ("test", test or [])):
        if not numbers:
            continue
        if source == "tfrecord":
            rows = [mini.record(mini.example(images[row], label)) for row, label in enumerate(numbers)]
            (root / f"{part}.tfrecord").write_bytes(b"".join(rows))
        elif source == "webdataset":
            members = [
                m
                for row, label in enumerate(numbers)
                for m in ((f"{row:03d}.png", images[row]), (f"{row:03d}.cls", b"%d" % label))
            ]
            (root / f"{part}.tar").write_bytes(mini.tar_of(members))
        elif source in ("parquet", "arrow"):
            rows = mini.table([images[row] for row in range(len(numbers))], numbers)
            (root / f"{part}.{source}").write_bytes(mini.parquet(rows) if source == "parquet" else mini.arrow(rows))
        elif source == "table":
            (root / part).mkdir(exist_ok=True)
            for row in range(len(numbers)):
                (root / part / f"{row:03d}.png").write_bytes(images[row])
            with open(root / "table.csv", "w" if part == "train" else "a") as file:
                file.writelines(["path,label,split\n"] if file.tell() == 0 else [])
                file.writelines(f"{part}/{row:03d}.png,{label},{part}\n" for row, label in enumerate(numbers))
        elif source == "idx":
            contents = mini.idx(_pictures(len(numbers)), np.array(numbers))
            for kind, content in zip(("images-idx3", "labels-idx1"), contents, strict=True):
                (root / f"{part}-{kind}-ubyte").write_bytes(content)
        else:
            prefix = "" if part == "train" else "test_"
            np.save(root / f"{prefix}images.npy", _pictures(len(numbers)))
            np.save(root / f"{prefix}labels.npy", np.array(numbers))
    return root


def _pictures(count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3]; the same ones again beyond the 48 of mini_imagenet."""
    return np.resize(mini.pictures()[0], (count, mini.SIDE, mini.SIDE, 3))


def load(root: Path, source: str, **settings: object) -> IndexedImages:
    """Through the cache, however many images may be unreadable."""
    images = load_images(DataConfig(source=source, root=str(root), max_bad_fraction=1.0, **settings))
    assert isinstance(images, IndexedImages)
    return images
