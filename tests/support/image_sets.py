"""Small sets of images, as files or as names alone, and indexes without images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mpl_scale.config.schema import DataConfig
from mpl_scale.data import ImageFiles, Splits, make_splits
from mpl_scale.data.index.reader import FORMAT, VERSION


def write_folder(root: Path, *, classes: int = 2, images: int = 3, suffix: str = ".png", side: int = 8) -> Path:
    generator = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(images):
            pixels = generator.integers(0, 256, (side, side + 1, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}{suffix}")
    return root


def image_set(counts: list[int]) -> ImageFiles:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"class{label}" for label in range(len(counts)))
    total = len(labels)
    return ImageFiles(np.array([f"{i}.png" for i in range(total)]), labels, np.full((total, 2), 8, np.int32), names)


def split(images: object, name: str, seed: int = 0, **settings: object) -> Splits:
    return make_splits(images, config=DataConfig(split=name, **settings), seed=seed)


def describe_index(
    folder: Path, shards: list[tuple[str, str]], *, classes: list[str], count: int, refused: int = 0
) -> None:
    """The description of an index of empty shards, (file name, part) each; its arrays are the caller's."""
    (folder / "data").mkdir(parents=True)
    described = []
    for name, part in shards:
        path = folder / "data" / name
        path.touch()
        described.append([name, part, 0, path.stat().st_mtime_ns, False])
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "source": "tfrecord",
        "root": str(folder / "data"),
        "options": {},
        "layout": "encoded",
        "classes": classes,
        "count": count,
        "refused": refused,
        "refusals": refused,
        "sha256": {},
        "shards": described,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
