"""Which samples a run used for what, written beside its results: counts, hashes, and the ids themselves."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.data.registry import ImageSet
from mpl_scale.data.samples.joined import JoinedImages
from mpl_scale.data.samples.splits import Splits

PARTS = ("test", "held_out", "labelled", "unlabelled")
_CHUNK = 1 << 20  # ids hashed at once


def write_manifest(splits: Splits, folder: Path) -> bool:
    """Write `manifest.json` and one .npy of ids per part; returns whether another split's manifest was there before.

    Nothing is written where the same one is there already: a restart costs the hashes.

    Args:
        splits: what to write down.
        folder: is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    manifest = _describe(splits)
    before = _read(path)
    if before == manifest:
        return False
    for name in PARTS:
        aside = folder / f".{name}.npy"
        with open(aside, "wb") as file:
            np.save(file, getattr(splits, name))
        os.replace(aside, folder / f"{name}.npy")
    aside = folder / ".manifest.json"
    aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)  # last: it vouches for the arrays
    return before is not None


def refuse_other_unlabelled(splits: Splits, folder: Path) -> None:
    """Refuse to go on with another index of unlabelled images than the one a run began with.

    Compared by content: an index may be moved. Nothing is refused where there is no manifest.

    Args:
        splits: as the run is asked to go on.
        folder: where `write_manifest` has written for the run.

    Raises:
        ValueError: naming both.
    """
    before, now = _read(folder / "manifest.json"), _describe_unlabelled(splits)
    if not isinstance(before, dict) or "unlabelled_index" not in before or before["unlabelled_index"] == now:
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
    return _describe_index(splits.images.second) if isinstance(splits.images, JoinedImages) else None


def _describe_index(images: ImageSet) -> dict[str, str] | None:
    if not isinstance(images, IndexedImages):
        return None
    return {"folder": str(images.folder), "root": str(images.root), "sha256": images.fingerprint}


def _describe(splits: Splits) -> dict[str, Any]:
    images = splits.images
    return {
        "images": len(images),
        "refused": len(images.refused),
        "classes": len(images.classes),
        "index": _describe_index(images.first if isinstance(images, JoinedImages) else images),
        "unlabelled_index": _describe_unlabelled(splits),
        "parts": {name: _part(getattr(splits, name), f"{name}.npy") for name in PARTS},
    }


def _part(ids: np.ndarray, file: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        digest.update(ids[start : start + _CHUNK].astype("<i8").tobytes())
    return {"file": file, "count": len(ids), "sha256": digest.hexdigest()}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
