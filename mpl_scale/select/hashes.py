"""SHA-256 of encoded images: how a test set's images are kept out of the unlabelled set (section 3.3)."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mpl_scale.data.encoded.header import UnreadableImage
from mpl_scale.data.index.reader import IndexedImages
from mpl_scale.files import expanded, replacing
from mpl_scale.inference.scores import Column


class HashedImages(IndexedImages):
    """An index that keeps the SHA-256 of every encoded image it reads, until its score is written."""

    def __init__(self, folder: Path, *, root: Path | None = None) -> None:
        super().__init__(folder, root=root, root_setting="--root")
        self._hashes: dict[int, bytes] = {}

    def read(self, sample: int) -> np.ndarray:
        """The encoded image; its hash is kept for `column`."""
        encoded = super().read(sample)
        self._hashes[sample] = hashlib.sha256(encoded.data).digest()
        return encoded

    @property
    def column(self) -> Column:
        """The hashes, as a column of score files."""
        return Column(("sha256", "u1", (32,)), self._take)

    def _take(self, ids: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        digests = b"".join(self._hashes.pop(sample) for sample in ids.tolist())
        return np.frombuffer(digests, np.uint8).reshape(len(ids), 32)


_ROWS = 1 << 16  # images hashed between writes


def matches(digests: np.ndarray, wanted: frozenset[bytes]) -> np.ndarray:
    """Which of the SHA-256, uint8 [n, 32], are among the wanted ones; bool [n]."""
    found = np.zeros(len(digests), bool)
    if not wanted:
        return found
    starts = np.array([int.from_bytes(digest[:8], "little") for digest in wanted], np.uint64)
    own = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    for row in np.flatnonzero(np.isin(own, starts)):  # few: the others are told apart by 8 bytes
        found[row] = digests[row].tobytes() in wanted
    return found


def read_hashes(path: Path) -> frozenset[bytes]:
    """The SHA-256 of a file, 64 hexadecimal digits a line; what follows on the line is passed over.

    Raises:
        ValueError: a line that has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--remove {path}: cannot be read: {error}") from error
    found = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            digest = bytes.fromhex(line.split()[0])
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise ValueError(f"--remove {path}, line {number}: {line[:80]!r} is no SHA-256 of 64 hexadecimal digits")
        found.add(digest)
    return frozenset(found)


def write_hashes(index: Path, output: Path, *, root: Path | None = None) -> tuple[int, int]:
    """Write the SHA-256 of an index's encoded images, one a line in the order of the ids; one process.

    Returns how many were written, and how many images could not be read.

    Raises:
        ValueError: no index there, or its shards have changed.
    """
    images = IndexedImages(expanded(index), root=root, root_setting="--root")
    refused = set(images.refused.tolist())

    def hash_of(sample: int) -> str | None:
        try:
            return hashlib.sha256(images.read(sample).data).hexdigest()
        except UnreadableImage:
            return None

    lost = len(refused)
    with ThreadPoolExecutor() as threads, replacing(output) as draft, open(draft, "w", encoding="utf-8") as file:
        for start in range(0, len(images), _ROWS):
            samples = [row for row in range(start, min(start + _ROWS, len(images))) if row not in refused]
            for digest in threads.map(hash_of, samples):
                lost += digest is None
                file.write("" if digest is None else f"{digest}\n")
    return len(images) - lost, lost
