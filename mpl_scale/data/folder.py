"""Source `folder`: root/<class>/*.png, *.jpg or *.jpeg; classes and files in sorted order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpl_scale.data.probe import probe_files
from mpl_scale.data.registry import ImageFiles, register_source

SUFFIXES = (".png", ".jpg", ".jpeg")


@register_source("folder")
def read_folder(root: Path | None) -> ImageFiles:
    """The image files below `root`, one sub-folder per class; hidden files and folders are skipped.

    Raises:
        ValueError: no root, no class folders, a class without images, or unreadable images.
    """
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
    paths: list[str] = []
    counts: list[int] = []
    for folder in folders:
        names = sorted(file.name for file in folder.iterdir() if _is_image(file))
        if not names:
            raise ValueError(f"class folder '{folder}' holds no {', '.join(SUFFIXES)} file; add images or remove it")
        paths += [f"{folder}/{name}" for name in names]
        counts.append(len(names))
    return ImageFiles(
        paths=np.array(paths),
        labels=np.repeat(np.arange(len(folders), dtype=np.int64), counts),
        sizes=probe_files(paths),
        classes=tuple(folder.name for folder in folders),
    )


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
