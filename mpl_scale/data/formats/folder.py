"""Sources `folder`: root/<class>/**/*.png, .jpg, ..., and `images`: any of these below the root, without labels.

Classes, folders and files are in sorted order. A class folder may hold folders, nested to any depth, and links to
folders. Where all folders of the root are named after parts (train, val, test; parts.py), they hold the class folders:
root/train/<class>, root/val/<class>.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.encoded.probe import probe_file
from mpl_scale.data.index.census import Census
from mpl_scale.data.index.format import (
    ENTRY,
    Layout,
    NoShards,
    PlainFormat,
    Refusal,
    Scan,
    ScanOptions,
    Shard,
    alike,
    register_format,
    untrained,
)
from mpl_scale.data.index.parts import Folder, is_part, left_over, part_of, parts_line, walk
from mpl_scale.data.registry import ImageFiles, register_source

SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)


@register_source("folder")
def read_folder(root: Path | None) -> ImageFiles:
    """The image files below `root`, one sub-folder per class; hidden files and folders are skipped.

    Raises:
        ValueError: no root, no class folders, or a class without images.
    """
    folders = _folders(root)
    assert root is not None  # _folders has refused it
    return _read(root, folders, classes=tuple(_class_names(root)))


def read_unlabelled(root: Path) -> ImageFiles:
    """All image files below `root`, at any depth, or the one image that it is; they have no labels, so class 0 of one.

    Raises:
        ValueError: there is nothing at `root`, or no image.
    """
    if root.is_file():
        return replace(_read(root.parent, [Shard("")], classes=("",), only=root.name), notes=())
    if not root.is_dir():
        raise ValueError(f"'{root}' is neither a folder of images nor an image")
    images = _read(root, [Shard(folder.name) for folder in walk(root)], classes=("",))
    images = replace(images, notes=images.notes[1:])  # there are no parts
    if not len(images):
        raise ValueError(f"'{root}' holds no {', '.join(SUFFIXES)} file; name the folder of the images")
    return images


def _read(root: Path, folders: Sequence[Shard], *, classes: tuple[str, ...], only: str | None = None) -> ImageFiles:
    """The images of some folders. only: the name of the one file to take."""
    named, scans = zip(*(_scan(root, shard, only=only) for shard in folders), strict=True)
    counts = [len(scan.entries) for scan in scans]
    paths = [
        os.path.join(root, shard.name, name) for shard, names in zip(folders, named, strict=True) for name in names
    ]
    entries = np.concatenate([scan.entries for scan in scans])
    firsts = np.cumsum(counts) - counts
    reasons = {
        int(first) + refusal.entry: refusal.reason
        for first, scan in zip(firsts, scans, strict=True)
        for refusal in scan.refusals
        if refusal.entry is not None
    }
    census = left_over(root, folders, layout="file")
    for scan in scans:
        census.update(scan.census)
    tests = np.repeat([shard.part == "test" for shard in folders], counts)
    return ImageFiles(
        np.array(paths),
        entries["label"].copy(),
        np.stack([entries["height"], entries["width"]], axis=1),
        classes,
        reasons,
        tests=np.flatnonzero(tests),
        notes=(
            *parts_line([(shard.name, shard.part, count) for shard, count in zip(folders, counts, strict=True)]),
            *census.lines(),
            *alike(classes),
            *untrained(classes, np.setdiff1d(np.arange(len(classes)), entries["label"][~tests]).tolist()),
        ),
    )


@register_format("folder")
class FolderTree(PlainFormat):
    """The format of an index: each folder, at any depth, is a shard of named files."""

    layout: Layout = "file"

    def shards(self, root: Path) -> Sequence[Shard]:
        return _folders(root)

    def classes(self, root: Path) -> Sequence[str] | None:
        return _class_names(root)

    def scan(self, root: Path, shard: Shard, *, options: ScanOptions, unpacked: Path) -> Scan:
        return _scan(root, shard)[1]


@register_format("images")
class Images(FolderTree):
    """All images below a folder, at any depth, without labels: whatever the folders are called."""

    def shards(self, root: Path) -> Sequence[Shard]:
        found = list(walk(root))
        if not any(_is_image(name) for folder in found for name in folder.files):
            raise NoShards(f"mpl_scale.data.root = '{root}' holds no {', '.join(SUFFIXES)} file")
        return [Shard(folder.name or ".", "unlabelled") for folder in found]

    def classes(self, root: Path) -> None:
        return None


def _scan(root: Path, shard: Shard, *, only: str | None = None) -> tuple[list[str], Scan]:
    """The image files of one folder, sorted, and what was found in them; only: of the file of that name."""
    here = next(walk(root, shard.name)) if only is None else Folder(shard.name, [only], [])
    images = [name for name in here.files if only is not None or _is_image(name)]
    scan = scan_files(root, shard.name, images, label=shard.label)
    for other in here.files:
        if not _is_image(other):
            scan.census.leave_out(f"{shard.name}/{other}")
    for other in here.loops:
        scan.census.leave_out(f"{shard.name}/{other}", "links to a folder above")
    return images, scan


def scan_files(root: Path, folder: str, files: Sequence[str], *, label: int = 0) -> Scan:
    """The image files of these names in a folder, relative to the root, in the given order."""
    names = [os.fsencode(name) for name in files]
    here = os.fsencode(root / folder)
    facts = np.zeros((len(names), 3), np.int64)  # bytes, height, width
    refusals, census = [], Census()
    for row, name in enumerate(names):
        path = os.path.join(here, name)
        try:
            header = probe_file(path)
            facts[row] = os.stat(path).st_size, *header.stored
            census.kinds[header.label] += 1
        except (UnreadableImage, OSError) as error:
            refusals.append(Refusal(f"{folder}/{os.fsdecode(name)}", None, str(error), row))
    entries = np.zeros(len(names), ENTRY)
    entries["length"], entries["height"], entries["width"] = facts.T
    entries["label"] = label
    entries["label"][[refusal.entry for refusal in refusals if refusal.entry is not None]] = 0
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return Scan(entries, refusals, names=b"".join(names), name_ends=ends, census=census)


def _folders(root: Path | None) -> list[Shard]:
    """A shard for each folder of a class: the class folder and those below it."""
    if root is None:
        raise ValueError(
            "mpl_scale.data.root = null; source folder needs the folder that holds one sub-folder per class"
        )
    if not root.is_dir():
        raise ValueError(
            f"mpl_scale.data.root = '{root}' is no folder; give the one that holds one sub-folder per class"
        )
    labels = {name: label for label, name in enumerate(_class_names(root))}
    if len(labels) < 2:
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds {len(labels)} class folders; put the images in root/<class>/<image>"
        )
    shards: list[Shard] = []
    for folder in _class_folders(root):
        below = list(walk(root, folder))
        if not any(_is_image(name) for inner in below for name in inner.files):
            raise ValueError(
                f"class folder '{root / folder}' holds no {', '.join(SUFFIXES)} file; add images or remove it"
            )
        label = labels[folder.rpartition("/")[2]]
        part = part_of(folder.partition("/")[0]) if "/" in folder else "train"
        shards += [Shard(inner.name, part, label) for inner in below]
    _refuse_linked(root, shards)
    return sorted(shards, key=lambda shard: shard.part == "test")


def _refuse_linked(root: Path, shards: Sequence[Shard]) -> None:
    """ValueError where a link puts a folder into two classes or parts: which label is right, or is it test data?"""
    real: dict[str, Shard] = {}
    for shard in shards:
        other = real.setdefault(os.path.realpath(root / shard.name), shard)
        if (other.label, other.part) != (shard.label, shard.part):
            raise ValueError(
                f"mpl_scale.data.root = '{root}': '{other.name}' and '{shard.name}' are one folder, by a link, in two "
                "classes or parts; remove the link"
            )


def _class_folders(root: Path) -> list[str]:
    """Relative to the root: <class>, or <part>/<class>."""
    folders = _visible_folders(root)
    parts = [folder for folder in folders if is_part(folder)]
    if folders and len(parts) == len(folders):
        return [f"{part}/{folder}" for part in folders for folder in _visible_folders(root / part)]
    whole = next((part for part in parts if _visible_folders(root / part)), None)
    if whole is not None:
        others = [folder for folder in folders if folder not in parts]
        raise ValueError(
            f"mpl_scale.data.root = '{root}' holds '{whole}', a part with folders of its own, beside "
            f"{', '.join(map(repr, others[:5]))}: are these classes, or parts? Keep one kind there, "
            "and move the rest away (images without labels: mpl_scale.data.unlabelled)"
        )
    return folders


def _class_names(root: Path) -> list[str]:
    return sorted({folder.rpartition("/")[2] for folder in _class_folders(root)})


def _visible_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
