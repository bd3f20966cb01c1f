"""Which samples a run used for what, written beside its results: counts, hashes, and the ids themselves."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpl_scale.data.index import IndexedImages
from mpl_scale.data.splits import Splits

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


def _describe(splits: Splits) -> dict[str, Any]:
    images = splits.images
    index = (
        {"folder": str(images.folder), "root": str(images.root), "sha256": images.fingerprint}
        if isinstance(images, IndexedImages)
        else None
    )
    return {
        "images": len(images),
        "refused": len(images.refused),
        "classes": len(images.classes),
        "index": index,
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
