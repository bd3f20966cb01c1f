"""Which samples a run used for what, written beside its results: counts, hashes, and the ids themselves."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.index.contents import middle_of
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.joined import APART, UNLABELLED_INDEX, JoinedImages
from mpl_scale.data.registry import ImageFiles, ImageSet
from mpl_scale.data.samples.splits import Splits
from mpl_scale.files import replace_text, replacing, save_array

PARTS = ("test", "held_out", "labelled", "unlabelled")
TWINS = "twins.csv"
"""Training images that are left out, and the image to evaluate on that each of them is."""
_COMPARED = ("images", "refused", "classes", "class_names", "labels", "files", "contents")
_END = 64
"""Bytes at the end of a file that tell its content."""
_CHUNK = 1 << 20  # ids hashed at once


def write_manifest(splits: Splits, folder: Path, *, manifest: Mapping[str, Any] | None = None) -> bool:
    """Write `manifest.json` and one .npy of ids per part; returns whether another split's manifest was there before.

    Nothing is written where the same one is there already: a restart costs the hashes.

    Args:
        splits: what to write down.
        folder: is made.
        manifest: of the splits, as `describe_splits` returns it; None: it is made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = describe_splits(splits) if manifest is None else manifest
    before = read_manifest(folder)
    if before == manifest:
        return False
    for name in PARTS:
        with replacing(folder / f"{name}.npy") as draft:
            save_array(draft, getattr(splits, name))
    rows = [tuple(map(splits.images.name, pair)) for pair in splits.twins.tolist()]
    if rows:
        with replacing(folder / TWINS) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("left out", "evaluated on"), *rows])
    replace_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")  # last: it vouches for the arrays
    return before is not None and not same_samples(before, manifest)


def content(manifest: Mapping[str, Any]) -> dict[str, str | int | None]:
    """Which samples a manifest says are used for what, by field: without paths, because data may be moved."""
    found = {f"data.{name}": manifest[name] for name in _COMPARED if name in manifest}
    found |= {f"data.{name}": (manifest.get(name) or {}).get("sha256") for name in ("index", "unlabelled_index")}
    found |= {f"data.{name}": digest for name, digest in (manifest.get("apart") or {}).items()}
    parts = {name: f"{part['count']} images, sha256 {part['sha256'][:12]}" for name, part in manifest["parts"].items()}
    return found | {f"splits.{name}": part for name, part in parts.items()}


def same_samples(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two manifests are of the same data and split; a field that an earlier version did not write is equal."""
    was, is_now = content(before), content(now)
    return all(is_now[field] == value for field, value in was.items() if field in is_now)


def refuse_other_unlabelled(splits: Splits, folder: Path) -> None:
    """Refuse to go on with another index of unlabelled images than the one a run began with.

    Compared by content: an index may be moved. Nothing is refused where there is no manifest.

    Args:
        splits: as the run is asked to go on.
        folder: where `write_manifest` has written for the run.

    Raises:
        ValueError: naming both.
    """
    before, now = read_manifest(folder), _describe_unlabelled(splits)
    if before is None or "unlabelled_index" not in before or before["unlabelled_index"] == now:
        return
    began = before["unlabelled_index"]
    if began is None or now is None or began["sha256"] != now["sha256"]:
        raise ValueError(
            f"mpl_scale.data.unlabelled_index = {_named(now)}, but the run of '{folder.parent}' began with "
            f"{_named(began)}: set it to that one, or begin a new run under another --output"
        )


def _named(index: dict[str, str] | None) -> str:
    return "null" if index is None else f"'{index['folder']}' (sha256 {index['sha256'][:12]})"


def _describe_unlabelled(splits: Splits) -> dict[str, str] | None:
    found = splits.images.named(UNLABELLED_INDEX) if isinstance(splits.images, JoinedImages) else []
    return _describe_index(found[0]) if found else None


def _describe_index(images: ImageSet) -> dict[str, str] | None:
    if not isinstance(images, IndexedImages):
        return None
    return {"folder": str(images.folder), "root": str(images.root), "sha256": images.fingerprint}


def _describe_apart(images: ImageSet) -> dict[str, str | None] | None:
    """What stands for the content of each place that is named apart, by field; None: no place is."""
    if not isinstance(images, JoinedImages) or not images.named(APART[0]):
        return None
    found = {name: [s.fingerprint for s in images.named(name) if isinstance(s, IndexedImages)] for name in APART}
    return {name: _hash_text(digests) if digests else None for name, digests in found.items()}


def describe_splits(splits: Splits) -> dict[str, Any]:
    """The manifest: counts and hashes of the parts, and of the data they are parts of."""
    images = splits.images
    return {
        "images": len(images),
        "refused": len(images.refused),
        "classes": len(images.classes),
        "class_names": _hash_text(str(name) for name in images.classes),
        "files": hash_files(images) if isinstance(images, ImageFiles) else None,
        "contents": _hash_text(middle_of(path).hex() for path in map(str, images.paths) if os.path.isfile(path))
        if isinstance(images, ImageFiles)
        else None,
        "labels": _hash(images.labels) if not isinstance(images, IndexedImages | JoinedImages) else None,
        "index": _describe_index(images.sets[0] if isinstance(images, JoinedImages) else images),
        "unlabelled_index": _describe_unlabelled(splits),
        "apart": _describe_apart(images),
        "parts": {name: _part(getattr(splits, name), f"{name}.npy") for name in PARTS},
    }


def hash_files(images: ImageFiles) -> str:
    """Stands for the files: their names, sizes in bytes and last bytes."""
    return _hash_text(_described(images))


def _part(ids: np.ndarray, file: str) -> dict[str, Any]:
    return {"file": file, "count": len(ids), "sha256": _hash(ids)}


def _hash(numbers: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(numbers), _CHUNK):
        digest.update(numbers[start : start + _CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()


def _described(images: ImageFiles) -> Iterator[str]:
    """Each file's folder, name, size and last bytes: a folder may be moved, its files may not change.

    An image ends with what is its own: compressed pixels, in a PNG also their checksum. Its first bytes may be the
    same in all.
    """
    for path in map(Path, images.paths):
        yield f"{path.parent.name}/{path.name} {_end_of(path) if path.is_file() else 'no file'}"  # a pipe would block


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END))
            return f"{size} {file.read().hex()}"
    except OSError:  # refused when the set was read, or gone: decoding says so
        return "unreadable"


def _hash_text(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is no readable one."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("parts"), dict) else None
