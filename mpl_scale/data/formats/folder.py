"""Source `folder`: root/<class>/*.png, *.jpg or *.jpeg; classes and files in sorted order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpl_scale.data.encoded.probe import UnreadableImage, probe_file
from mpl_scale.data.index.format import ENTRY, Layout, Refusal, Scan, ScanOptions, Shard, register_format
from mpl_scale.data.registry import ImageFiles, register_source

SUFFIXES = (".png", ".jpg", ".jpeg")


@register_source("folder")
def read_folder(root: Path | None) -> ImageFiles:
    """The image files below `root`, one sub-folder per class; hidden files and folders are skipped.

    Raises:
        ValueError: no root, no class folders, or a class without images.
    """
    folders = _class_folders(root)
    paths: list[str] = []
    counts: list[int] = []
    for folder in folders:
        names = _image_names(folder)
        paths += [f"{folder}/{name}" for name in names]
        counts.append(len(names))
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    sizes = np.zeros((len(paths), 2), np.int32)
    reasons: dict[int, str] = {}
    for sample, path in enumerate(paths):
        try:
            sizes[sample] = probe_file(path)
        except UnreadableImage as error:
            reasons[sample] = str(error)
            labels[sample] = 0
    return ImageFiles(np.array(paths), labels, sizes, tuple(folder.name for folder in folders), reasons)


@register_format("folder")
class FolderTree:
    """The same, for an index: each class folder is a shard of named files."""

    layout: Layout = "file"
    first_label: int | None = None
    checksums = False
    sidecars = ()

    def shards(self, root: Path) -> Sequence[Shard]:
        return [Shard(folder.name, label=label) for label, folder in enumerate(_class_folders(root))]

    def classes(self, root: Path) -> Sequence[str]:
        return [folder.name for folder in _class_folders(root)]

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        folder = root / shard.name
        names = [os.fsencode(name) for name in _image_names(folder)]
        entries = np.zeros(len(names), ENTRY)
        refusals = []
        for row, name in enumerate(names):
            path = os.path.join(os.fsencode(folder), name)
            try:
                entries["height"][row], entries["width"][row] = probe_file(path)
                entries["length"][row] = os.stat(path).st_size
                entries["label"][row] = shard.label
            except (UnreadableImage, OSError) as error:
                refusals.append(Refusal(f"{shard.name}/{os.fsdecode(name)}", None, str(error), row))
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Scan(entries, refusals, names=b"".join(names), name_ends=ends)


def _class_folders(root: Path | None) -> list[Path]:
    if root is None:
        raise ValueError(
            "mpl_scale.data.root = null; source folder needs the folder that holds one sub-folder per class"
        )
    if not root.is_dir():
        raise ValueError(
            f"mpl_scale.data.root = '{root}' is no folder; give the one that holds one sub-folder per class"
        )
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds {len(folders)} class folders; put the images in root/<class>/<image>"
        )
    return folders


def _image_names(folder: Path) -> list[str]:
    """Sorted; ValueError where there is none."""
    names = sorted(name for name in os.listdir(folder) if _is_image(name))
    if not names:
        raise ValueError(f"class folder '{folder}' holds no {', '.join(SUFFIXES)} file; add images or remove it")
    return names


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
