"""An index of some samples of another one, in any number, under new labels: the same shards, no image is copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.index.reader import ARRAYS, IndexedImages, pixels_name, sha256_of
from mpl_scale.files import create_array, replacing_folder, save_array, write_text

_ROWS = 1 << 20  # samples copied at once


def write_subset(
    images: IndexedImages,
    ids: np.ndarray,
    *,
    labels: np.ndarray,
    classes: Sequence[str],
    output: Path,
    about: dict[str, Any],
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the index `output`, replacing an older one, by one rename.

    Args:
        images: the index that the samples are of.
        ids: int64 [m], at least one, ascending; an id may be repeated.
        labels: int64 [m].
        classes: names by label.
        output: the folder.
        about: more keys for meta.json.
        extra: writes further files into the folder, before it gets its name.
    """
    with replacing_folder(output) as folder:
        (folder / "pixels").mkdir()
        names = _Names(images.folder, folder, len(ids)) if images.meta["layout"] == "file" else None
        written = {name: _create(folder / f"{name}.npy", dtype, len(ids)) for name, dtype in ARRAYS.items()}
        sources = {name: np.load(images.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS if name != "label"}
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            written["label"][rows] = labels[rows]
            for name, source in sources.items():
                written[name][rows] = source[ids[rows]]
            if names is not None:
                names.add(ids[rows])
        for array in written.values():
            array.flush()
        if names is not None:
            names.close()
        save_array(folder / "refused.npy", np.zeros(0, np.int64))
        (folder / "refused.jsonl").touch()
        own = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in own}
        for number, shard in enumerate(images.shards):
            if shard.unpacked:
                name = pixels_name(number)
                _link(images.folder / name, folder / name)
                hashes[name] = images.meta["sha256"][name]
        meta = {
            **images.meta,
            **about,
            "root": str(images.root),
            "classes": list(classes),
            "count": len(ids),
            "refused": 0,
            "refusals": 0,
            "reasons": {},
            "labels": {"faults": 0, "examples": [], "suspicion": None, "offset": None, "confirm": None},
            "untrained": [],
            "sidecars": {},  # labels and names are its own
            "census": {},
            "sha256": hashes,
        }
        write_text(folder / "meta.json", json.dumps(meta))
        extra(folder)


class _Names:
    """Copies the file names of samples."""

    def __init__(self, source: Path, target: Path, count: int) -> None:
        self._source_ends = np.load(source / "name_end.npy", mmap_mode="r")
        self._source = np.memmap(source / "name.bin", np.uint8, mode="r")
        self._ends = _create(target / "name_end.npy", np.dtype("<i8"), count)
        self._file = open(target / "name.bin", "wb")  # noqa: SIM115
        self._rows = self._bytes = 0

    def add(self, ids: np.ndarray) -> None:
        """Append the names of these samples."""
        ends = np.asarray(self._source_ends[ids])
        begins = np.where(ids > 0, self._source_ends[np.maximum(ids - 1, 0)], 0)
        lengths = ends - begins
        own_ends = np.cumsum(lengths)
        places = np.arange(own_ends[-1]) + np.repeat(begins - (own_ends - lengths), lengths)
        self._file.write(self._source[places].tobytes())
        self._ends[self._rows : self._rows + len(ids)] = self._bytes + own_ends
        self._rows, self._bytes = self._rows + len(ids), self._bytes + int(own_ends[-1])

    def close(self) -> None:
        """Flush both files."""
        self._file.close()
        self._ends.flush()


def _create(path: Path, dtype: np.dtype, count: int) -> np.memmap:
    shape = (count, 2) if path.stem == "size" else (count,)
    return create_array(path, dtype=dtype, shape=shape)


def _link(source: Path, target: Path) -> None:
    """The file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
