"""Files beside the shards that labels or class names are read from: an index is stale once one of them changes.

A small one is compared by content, so that a copied data set stays up to date; a larger one by size and time, as shards
are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

HASHED_BYTES = 1 << 24
"""Files up to this size are compared by content: 20 ms to read."""

Record = dict[str, list[int | str] | None]
"""By name: bytes and SHA-256, or bytes and modification time in ns; None: there is no such file."""


def record(root: Path, names: Sequence[str]) -> Record:
    """Size and SHA-256 of each file, or its modification time where it is large; None where there is no file."""
    return {name: _describe(root / name) for name in names}


def changed(root: Path, recorded: Mapping[str, object]) -> list[str]:
    """The files that are not as they were recorded."""
    return [name for name, before in recorded.items() if _describe(root / name) != before]


def _describe(path: Path) -> list[int | str] | None:
    try:
        size = path.stat().st_size
        if size <= HASHED_BYTES:
            content = path.read_bytes()
            return [len(content), hashlib.sha256(content).hexdigest()]
        return [size, path.stat().st_mtime_ns]
    except OSError:
        return None
